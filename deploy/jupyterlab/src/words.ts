// What the extension says, in English and Korean. `{name}` is replaced by a value.

const english = {
  save: 'Save environment…',
  saveShort: 'Save environment',
  saveCaption: 'Save this session as an image, and start from it next time',
  panel: 'Saved environments',
  title: 'Save environment',
  name: 'Name',
  nameHint: 'Lower-case letters and digits, with . _ - between them',
  tag: 'Version',
  message: 'Description',
  messageHint: 'What this environment is for (optional)',
  within: 'What will be in it',
  base: 'Everything of {image}',
  changes: 'What was changed since: {size}',
  changesUnknown: 'What was changed since the session began',
  packages: 'Packages: {list}',
  more: 'and {count} more',
  without: 'What will not be in it',
  volume: '{path} ({kind}): a mounted volume, which stays where it is',
  memory: 'What is only in memory: variables of notebooks, running programs. Save notebooks first.',
  secrets: 'Files with credentials, and caches',
  starts: 'This image will start on this hub.',
  startsNot: 'This image will not start on this hub.',
  startsUnknown: 'Whether this image will start on this hub is not certain.',
  started_here: 'The hub started this session from {base}; the image keeps its user and command.',
  jupyterhub_removed: 'The package jupyterhub was removed, which jupyterhub-singleuser is part of.',
  server_removed: 'The package {name} was removed.',
  needed_removed: 'The package {name} was removed, which a server needs.',
  jupyterhub_version: 'jupyterhub {version} was installed, the hub has {hub}: they may not work together.',
  home_on_volume: 'The home directory is on the volume {path}: not in the image, and there next time if the hub mounts it.',
  program_missing: 'The program {name}, by which a server is started, is not in the image any more.',
  program_mounted: 'The program {name}, by which a server is started, is in a mounted directory: not in the image, and there next time if the hub mounts it.',
  program_there: '{name} is in the image, at {path}.',
  packages_unknown: 'Which packages were changed is not known.',
  go: 'Save',
  cancel: 'Cancel',
  stop: 'Cancel the save',
  replace: 'Replace it',
  close: 'Close',
  retry: 'Try again',
  queued: 'Waiting',
  place: 'Waiting, {count} before it',
  retrying: 'Waiting for the next attempt',
  locating: 'Looking',
  scanning: 'Reading changes',
  streaming: 'Saving',
  basePhase: 'Sending the base',
  finishing: 'Finishing',
  left: '{seconds} s left',
  done: 'Saved as {image}. Start from it next time.',
  spawn: 'Start page of the hub',
  failed: 'Not saved: {reason}',
  cancelled: 'The save was cancelled.',
  tag_exists: 'There is an image with this name and version already. Choose another version, or replace it.',
  conflict: 'This session is being saved already.',
  quota_exceeded: 'Your space for images is full. Delete some that you no longer need.',
  registry_unavailable: 'The registry for images cannot be reached. Try again later.',
  credentials_refused: 'The registry refuses the service. Tell the administrator.',
  unavailable: 'The service cannot be reached. Try again later.',
  too_many: 'Too many saves at once. Try again in a while.',
  image_pinned: 'The image with this name and version is pinned, so it is not replaced.',
  not_permitted: 'You may not do this.',
  unauthenticated: 'The hub does not accept this session any more. Log in again.',
  not_found: 'The service does not know this session yet. Try again in some seconds.',
  container_gone: 'The session ended before it was saved.',
  details: 'Details: {detail}',
  mine: 'My saves',
  shared: 'Shared with me',
  none: 'Nothing saved yet.',
  refresh: 'Refresh',
  copy: 'Copy reference',
  copied: 'Copied',
  from: 'by {owner}',
  manage: 'Share, rename, delete: page of the service'
} as const;

export type Word = keyof typeof english;

const korean: Record<Word, string> = {
  save: '환경 저장…',
  saveShort: '환경 저장',
  saveCaption: '이 세션을 이미지로 저장하고 다음에 여기서 시작합니다',
  panel: '저장된 환경',
  title: '환경 저장',
  name: '이름',
  nameHint: '영문 소문자와 숫자, 그 사이에 . _ -',
  tag: '버전',
  message: '설명',
  messageHint: '이 환경의 용도 (선택)',
  within: '저장되는 것',
  base: '{image}의 모든 내용',
  changes: '그 뒤에 바뀐 것: {size}',
  changesUnknown: '세션이 시작된 뒤에 바뀐 것',
  packages: '패키지: {list}',
  more: '외 {count}개',
  without: '저장되지 않는 것',
  volume: '{path} ({kind}): 마운트된 볼륨으로, 원래 자리에 남습니다',
  memory: '메모리에만 있는 것: 노트북의 변수, 실행 중인 프로그램. 노트북을 먼저 저장하세요.',
  secrets: '인증 정보가 있는 파일과 캐시',
  starts: '이 이미지는 이 허브에서 시작됩니다.',
  startsNot: '이 이미지는 이 허브에서 시작되지 않습니다.',
  startsUnknown: '이 이미지가 이 허브에서 시작될지 확실하지 않습니다.',
  started_here: '허브가 {base}에서 이 세션을 시작했고, 이미지는 그 사용자와 명령을 유지합니다.',
  jupyterhub_removed: 'jupyterhub-singleuser가 들어 있는 jupyterhub 패키지가 제거되었습니다.',
  server_removed: '{name} 패키지가 제거되었습니다.',
  needed_removed: '서버에 필요한 {name} 패키지가 제거되었습니다.',
  jupyterhub_version: 'jupyterhub {version}이 설치되었고 허브는 {hub}입니다. 함께 작동하지 않을 수 있습니다.',
  home_on_volume: '홈 디렉터리가 볼륨 {path}에 있어 이미지에 들어가지 않으며, 허브가 다음에도 마운트해야 있습니다.',
  program_missing: '서버를 시작하는 프로그램 {name}이(가) 이미지에 더 이상 없습니다.',
  program_mounted: '서버를 시작하는 프로그램 {name}이(가) 마운트된 디렉터리에 있어 이미지에 들어가지 않으며, 허브가 다음에도 마운트해야 있습니다.',
  program_there: '{name}이(가) 이미지의 {path}에 있습니다.',
  packages_unknown: '어떤 패키지가 바뀌었는지 알 수 없습니다.',
  go: '저장',
  cancel: '취소',
  stop: '저장 취소',
  replace: '바꾸기',
  close: '닫기',
  retry: '다시 시도',
  queued: '대기 중',
  place: '대기 중, 앞에 {count}개',
  retrying: '다음 시도 대기 중',
  locating: '찾는 중',
  scanning: '변경 내용 읽는 중',
  streaming: '저장 중',
  basePhase: '기반 이미지 보내는 중',
  finishing: '마무리 중',
  left: '{seconds}초 남음',
  done: '{image}(으)로 저장되었습니다. 다음에 여기서 시작하세요.',
  spawn: '허브의 시작 페이지',
  failed: '저장되지 않았습니다: {reason}',
  cancelled: '저장이 취소되었습니다.',
  tag_exists: '같은 이름과 버전의 이미지가 이미 있습니다. 다른 버전을 고르거나 바꾸세요.',
  conflict: '이 세션은 이미 저장 중입니다.',
  quota_exceeded: '이미지 공간이 가득 찼습니다. 필요 없는 이미지를 삭제하세요.',
  registry_unavailable: '이미지 레지스트리에 연결할 수 없습니다. 나중에 다시 시도하세요.',
  credentials_refused: '레지스트리가 서비스를 거부합니다. 관리자에게 알리세요.',
  unavailable: '서비스에 연결할 수 없습니다. 나중에 다시 시도하세요.',
  too_many: '동시 저장이 너무 많습니다. 잠시 뒤에 다시 시도하세요.',
  image_pinned: '이 이름과 버전의 이미지는 고정되어 있어 바꿀 수 없습니다.',
  not_permitted: '권한이 없습니다.',
  unauthenticated: '허브가 이 세션을 더 이상 받아들이지 않습니다. 다시 로그인하세요.',
  not_found: '서비스가 아직 이 세션을 모릅니다. 몇 초 뒤에 다시 시도하세요.',
  container_gone: '저장되기 전에 세션이 끝났습니다.',
  details: '자세히: {detail}',
  mine: '내 저장',
  shared: '공유받은 것',
  none: '아직 저장된 것이 없습니다.',
  refresh: '새로 고침',
  copy: '참조 복사',
  copied: '복사됨',
  from: '{owner} 님의 것',
  manage: '공유, 이름 변경, 삭제: 서비스 페이지'
};

let words: Record<Word, string> = english;

/** Chooses the language: that of Lab, and that of the browser where Lab has its default. */
export function choose(lab: string, browser: string): void {
  const code = lab && !lab.startsWith('en') && lab !== 'default' ? lab : browser;
  words = code.toLowerCase().startsWith('ko') ? korean : english;
}

/** Returns a text with its values. */
export function t(word: Word, values: Record<string, string | number> = {}): string {
  return words[word].replace(/\{(\w+)\}/g, (all, name: string) => String(values[name] ?? all));
}

export const isWord = (code: string): code is Word => Object.hasOwn(english, code);

/** Returns a number of bytes for people. */
export function size(bytes: number): string {
  const units = ['B', 'kB', 'MB', 'GB', 'TB'];
  let unit = 0;
  for (; bytes >= 1000 && unit < units.length - 1; unit += 1) {
    bytes /= 1000;
  }
  return `${unit === 0 || bytes >= 100 ? Math.round(bytes) : bytes.toFixed(1)} ${units[unit] ?? ''}`;
}

"""What pages of the hub say, in English and Korean. ``{name}`` is replaced by a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Words = Callable[..., str]
"""Returns a sentence in one language: ``words("saved", image="a:b")``."""

_ENGLISH = {
    # Of an image.
    "hub_image": "The hub's image",
    "mine": "My saved images",
    "shared": "Shared with me",
    "shared_by": "shared by {owner}",
    "added": "added: {packages}",
    "more": "{packages} and {count} more",
    "image_unlisted": "Your saved images cannot be listed now: {reason}",
    "image_unchecked": "The saved image cannot be checked: {reason}",
    "image_unknown": "There is no such saved image, or it is not shared with you (any more).",
    "image_refused": "This is no saved image of yours, and none that is shared with you.",
    "image_not_offered": "The hub does not offer this image.",
    "image_unpulled": "The saved image cannot be pulled: {reason}",
    # Of a stop.
    "save_on_stop": "Save this environment when the server stops, also when it is stopped because it is idle",
    "last_stop": "Last stop, {at}: {text}",
    "saved": "Saved as {image}.",
    "saved_changes": "Saved as {image} ({size} of changes).",
    "saved_not": "Not saved: {reason}",
    "too_long": "Not saved: it took longer than {bound} s.",
    "interrupted": "Not saved: the hub ended while it waited for the save.",
    "cancelled": "The save was cancelled.",
    "waiting_retry": "The last attempt failed, and the next one was waited for.",
    "waiting_error": "The last attempt failed: {reason}",
    "waiting_node": "The node did not respond.",
    "waiting_slot": "Other saves were running on the node.",
    "waiting_queue": "Other saves were queued before it.",
    # Whether an image starts.
    "starts_not": "Does not start on this hub: {reasons}",
    "starts_perhaps": "May not start on this hub: {reasons}",
    "started_here": "This hub started this session from {base}, whose user and command the image keeps.",
    "session_problem": "{problem}",
    "packages_unknown": "The list of packages is not known.",
    "jupyterhub_removed": "The package jupyterhub was removed, which the command jupyterhub-singleuser is part of.",
    "server_removed": "The package {name} was removed.",
    "needed_removed": "The package {name} was removed, which a server needs.",
    "other_kind": "The session that it was saved from is no Jupyter server.",
    "jupyterhub_version": "jupyterhub {version} was installed, and the hub has {hub}: "
    "releases with different first numbers may not work together.",
    "program_missing": "The program {name}, by which a server is started, is not in the image any more.",
    "program_mounted": "The program {name}, by which a server is started, is in a mounted directory: it is not in the "
    "image, and is there at the next start only if the hub mounts it again.",
    "program_there": "{name} is in the image, at {path}.",
    "interpreter_missing": "The program {interpreter}, which the script {name} needs, is not in the image any more.",
    "interpreter_mounted": "The program {interpreter}, which the script {name} needs, is in a mounted directory: it is "
    "not in the image, and is there at the next start only if the hub mounts it again.",
    "command_missing": "The program {name}, by which the image's own command begins, is not in the image any more: it "
    "starts only if the hub sets another command, as it did for this session.",
    "command_mounted": "The program {name}, by which the image's own command begins, is in a mounted directory: it is "
    "not in the image. The hub started this session by another command.",
    "command_there": "The image's own command begins with {name}, at {path}; the hub started this session by another.",
    "user_missing": "The user {name}, by which the image starts, is not in its /etc/passwd any more: it starts only if "
    "the hub sets another user.",
    "user_mounted": "Whether the image knows its user {name} cannot be said: /etc/passwd is mounted.",
    "user_there": "The image starts by its user {name}, with the home directory {home} and the shell {shell}.",
    "home_on_volume": "The home directory is on the volume at {path}: it is not in the image, and is there at the next "
    "start only if the hub mounts it again.",
}

_KOREAN = {
    "hub_image": "허브의 이미지",
    "mine": "내가 저장한 이미지",
    "shared": "공유받은 이미지",
    "shared_by": "{owner} 님이 공유함",
    "added": "추가됨: {packages}",
    "more": "{packages} 외 {count}개",
    "image_unlisted": "지금은 저장된 이미지 목록을 볼 수 없습니다: {reason}",
    "image_unchecked": "저장된 이미지를 확인할 수 없습니다: {reason}",
    "image_unknown": "저장된 이미지가 없거나 (더 이상) 공유되지 않습니다.",
    "image_refused": "내가 저장했거나 공유받은 이미지가 아닙니다.",
    "image_not_offered": "허브에서 제공하지 않는 이미지입니다.",
    "image_unpulled": "저장된 이미지를 가져올 수 없습니다: {reason}",
    "save_on_stop": "서버가 멈출 때 이 환경을 저장합니다. 사용하지 않아 멈출 때도 저장합니다",
    "last_stop": "마지막 종료, {at}: {text}",
    "saved": "{image}(으)로 저장되었습니다.",
    "saved_changes": "{image}(으)로 저장되었습니다 (변경 {size}).",
    "saved_not": "저장되지 않았습니다: {reason}",
    "too_long": "저장되지 않았습니다: {bound}초보다 오래 걸렸습니다.",
    "interrupted": "저장되지 않았습니다: 저장을 기다리는 동안 허브가 종료되었습니다.",
    "cancelled": "저장이 취소되었습니다.",
    "waiting_retry": "마지막 시도가 실패해 다음 시도를 기다리고 있었습니다.",
    "waiting_error": "마지막 시도가 실패했습니다: {reason}",
    "waiting_node": "노드가 응답하지 않았습니다.",
    "waiting_slot": "노드에서 다른 저장이 진행 중이었습니다.",
    "waiting_queue": "앞에 다른 저장이 대기 중이었습니다.",
    "starts_not": "이 허브에서 시작되지 않습니다: {reasons}",
    "starts_perhaps": "이 허브에서 시작되지 않을 수 있습니다: {reasons}",
    "started_here": "이 허브가 {base}에서 이 세션을 시작했고, 이미지는 그 사용자와 명령을 유지합니다.",
    "session_problem": "{problem}",
    "packages_unknown": "어떤 패키지가 바뀌었는지 알 수 없습니다.",
    "jupyterhub_removed": "jupyterhub-singleuser 명령이 들어 있는 jupyterhub 패키지가 제거되었습니다.",
    "server_removed": "{name} 패키지가 제거되었습니다.",
    "needed_removed": "서버에 필요한 {name} 패키지가 제거되었습니다.",
    "other_kind": "Jupyter 서버가 아닌 세션에서 저장되었습니다.",
    "jupyterhub_version": "jupyterhub {version}이 설치되었고 허브는 {hub}입니다. "
    "첫 번호가 다른 버전은 함께 작동하지 않을 수 있습니다.",
    "program_missing": "서버를 시작하는 프로그램 {name}이(가) 이미지에 더 이상 없습니다.",
    "program_mounted": "서버를 시작하는 프로그램 {name}이(가) 마운트된 디렉터리에 있어 이미지에 "
    "들어가지 않으며, 허브가 다음에도 마운트해야 있습니다.",
    "program_there": "{name}이(가) 이미지의 {path}에 있습니다.",
    "interpreter_missing": "스크립트 {name}에 필요한 프로그램 {interpreter}이(가) 이미지에 더 이상 없습니다.",
    "interpreter_mounted": "스크립트 {name}에 필요한 프로그램 {interpreter}이(가) 마운트된 디렉터리에 있어 이미지에 "
    "들어가지 않으며, 허브가 다음에도 마운트해야 있습니다.",
    "command_missing": "이미지 자체의 명령에 쓰이는 프로그램 {name}이(가) 이미지에 더 이상 없습니다. "
    "이 세션처럼 허브가 다른 명령을 지정해야 시작됩니다.",
    "command_mounted": "이미지 자체의 명령에 쓰이는 프로그램 {name}이(가) 마운트된 디렉터리에 있어 "
    "이미지에 들어가지 않습니다. 허브는 이 세션을 다른 명령으로 시작했습니다.",
    "command_there": "이미지 자체의 명령은 {path}에 있는 {name}(으)로 시작하며, "
    "허브는 이 세션을 다른 명령으로 시작했습니다.",
    "user_missing": "이미지의 사용자 {name}이(가) /etc/passwd에 더 이상 없습니다. "
    "허브가 다른 사용자를 지정해야 시작됩니다.",
    "user_mounted": "/etc/passwd가 마운트되어 있어 이미지에 사용자 {name}이(가) 있는지 알 수 없습니다.",
    "user_there": "이미지는 사용자 {name}(으)로 시작하며, 홈 디렉터리는 {home}, 셸은 {shell}입니다.",
    "home_on_volume": "홈 디렉터리가 볼륨 {path}에 있어 이미지에 들어가지 않으며, 허브가 다음에도 마운트해야 있습니다.",
}

_LANGUAGES = {"en": _ENGLISH, "ko": _KOREAN}
_MOST_RANGES = 20


def words_in(language: str) -> Words:
    """Returns the words of a language, English for one that is not known."""
    known = _LANGUAGES.get(language, _ENGLISH)

    def say(code: str, **values: Any) -> str:
        return known[code].format(**values)

    return say


english = words_in("en")


def preferred(accepted: str) -> str:
    """Returns that of the languages here which a browser prefers, by its header ``Accept-Language`` (RFC 9110)."""
    best, most = "en", 0.0
    for part in accepted.split(",")[:_MOST_RANGES]:
        tag, _, weight = part.strip().partition(";")
        language = tag.strip().lower().partition("-")[0]
        try:
            quality = float(weight.strip().removeprefix("q=")) if weight else 1.0
        except ValueError:
            continue
        if language in _LANGUAGES and quality > most:
            best, most = language, quality
    return best


def words_of(spawner: Any) -> Words:
    """Returns the words for the request that a spawner handles; English where there is none, e.g. at a cull."""
    request = getattr(getattr(spawner, "handler", None), "request", None)
    return words_in(preferred(request.headers.get("Accept-Language", ""))) if request else english

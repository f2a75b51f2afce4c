// The dialog: name and description, what the image will have in it and what not, and whether it will start.

import { Dialog } from '@jupyterlab/apputils';
import { Widget } from '@lumino/widgets';

import { Contents, Reason, Refused, Wanted } from './api';
import { element, plain, reference } from './element';
import { explain } from './saving';
import { isWord, size, t } from './words';

const PACKAGES = 12;
const NAME = '[a-z0-9]+((\\.|_|__|-+)[a-z0-9]+)*';

function list(...items: (string | null)[]): HTMLElement {
  const found = items.filter((item): item is string => item !== null);
  return element('ul', {}, ...found.map(item => element('li', {}, item)));
}

function within(contents: Contents): HTMLElement {
  const { session, packages } = contents;
  const changed = (packages?.packages ?? []).filter(one => one.change !== 'removed');
  const named = changed.slice(0, PACKAGES).map(one => plain(`${one.name} ${one.version ?? ''}`.trim()));
  const more = changed.length - named.length + (packages?.more ?? 0);
  if (more > 0) {
    named.push(t('more', { count: more }));
  }
  return list(
    session.image ? t('base', { image: reference(session.image) }) : null,
    session.upper_bytes === null ? t('changesUnknown') : t('changes', { size: size(session.upper_bytes) }),
    named.length > 0 ? t('packages', { list: named.join(', ') }) : null
  );
}

function without(contents: Contents): HTMLElement {
  const volumes = contents.session.unsaved.filter(mount => mount.data);
  const more = contents.session.unsaved_more;
  return list(
    ...volumes.map(mount => t('volume', { path: plain(mount.path), kind: plain(mount.kind) })),
    more > 0 ? t('more', { count: more }) : null,
    t('memory'),
    t('secrets')
  );
}

/** Returns a reason in this language; one that is not known here in the service's own words. */
function sentence(reason: Reason): string {
  const values = Object.fromEntries(Object.entries(reason.values).map(([name, value]) => [name, reference(value)]));
  return isWord(reason.code) ? t(reason.code, values) : plain(reason.detail);
}

function starting(contents: Contents): HTMLElement {
  const { starts, reasons } = contents.start;
  const word = starts === true ? 'starts' : starts === false ? 'startsNot' : 'startsUnknown';
  return element(
    'div',
    { class: `jp-upperdeck-start jp-upperdeck-${word}`, role: 'note' },
    element('strong', {}, t(word)),
    list(...reasons.map(sentence))
  );
}

class Form extends Widget implements Dialog.IBodyWidget<Wanted> {
  private readonly name: HTMLInputElement;
  private readonly version: HTMLInputElement;
  private readonly message: HTMLTextAreaElement;

  constructor(contents: Contents, wanted: Wanted) {
    super();
    this.addClass('jp-upperdeck-dialog');
    const { session } = contents;
    this.name = element('input', {
      type: 'text', required: true, maxlength: '128', pattern: NAME, title: t('nameHint'), autocomplete: 'off',
      spellcheck: 'false', value: wanted.name ?? session.suggested_name, class: 'jp-mod-styled'
    });
    this.version = element('input', {
      type: 'text', maxlength: '128', pattern: '[A-Za-z0-9_][A-Za-z0-9_.-]*', autocomplete: 'off', spellcheck: 'false',
      value: wanted.tag ?? session.suggested_tag, class: 'jp-mod-styled'
    });
    this.message = element('textarea', {
      maxlength: '1000', rows: '2', placeholder: t('messageHint'), class: 'jp-mod-styled'
    });
    this.message.value = wanted.message ?? '';
    this.node.append(
      element('label', {}, element('span', {}, t('name')), this.name),
      element('label', {}, element('span', {}, t('tag')), this.version),
      element('label', {}, element('span', {}, t('message')), this.message),
      session.problem ? element('p', { class: 'jp-upperdeck-problem' }, plain(session.problem)) : '',
      starting(contents),
      element('h3', {}, t('within')),
      within(contents),
      element('h3', {}, t('without')),
      without(contents)
    );
  }

  getValue(): Wanted {
    const wanted: Wanted = { name: this.name.value.trim(), message: this.message.value.trim() };
    if (this.version.value.trim()) {
      wanted.tag = this.version.value.trim();
    }
    return wanted;
  }

  protected override onAfterAttach(): void {
    this.name.select();
  }
}

/** Asks what to save, and hands it to `begin` until that succeeds or the user gives up. */
export async function ask(load: () => Promise<Contents>, begin: (wanted: Wanted) => Promise<void>): Promise<void> {
  let contents: Contents;
  try {
    contents = await load();
  } catch (error) {
    await tell(error);
    return;
  }
  for (let wanted: Wanted = {}; ; ) {
    const body = new Form(contents, wanted);
    const dialog = new Dialog<Wanted>({
      title: t('title'),
      body,
      buttons: [Dialog.cancelButton({ label: t('cancel') }), Dialog.okButton({ label: t('go') })]
    });
    dialog.addClass('jp-upperdeck');
    const answer = await dialog.launch();
    if (!answer.button.accept || !answer.value) {
      return;
    }
    wanted = answer.value;
    try {
      await begin(wanted);
      return;
    } catch (error) {
      const again = await tell(error);
      if (again === null) {
        return;
      }
      if (again.replace) {
        try {
          await begin({ ...wanted, replace: again.replace });
          return;
        } catch (other) {
          await tell(other);
        }
      }
    }
  }
}

/** Says what went wrong. Returns what to do: try again, replace an image, or null to give up. */
async function tell(error: unknown): Promise<{ replace: string | null } | null> {
  const refused = error instanceof Refused ? error : new Refused(500, { detail: String(error) });
  const replaceable = refused.code === 'tag_exists' && refused.existing !== null;
  const buttons = [Dialog.cancelButton({ label: t('close') })];
  if (replaceable) {
    buttons.push(Dialog.warnButton({ label: t('replace'), accept: true }));
  }
  buttons.push(Dialog.okButton({ label: t('retry') }));
  const dialog = new Dialog({ title: t('title'), body: plain(explain(refused.code, refused.message)), buttons });
  dialog.addClass('jp-upperdeck');
  const answer = await dialog.launch();
  if (!answer.button.accept) {
    return null;
  }
  return { replace: replaceable && answer.button.label === t('replace') ? refused.existing : null };
}


// The side panel: what was saved, and what others share.

import { Widget } from '@lumino/widgets';

import { Refused, SavedImage, images } from './api';
import { button, element, plain } from './element';
import { explain } from './saving';
import { size, t } from './words';

function row(image: SavedImage): HTMLElement {
  const title = plain(image.tags[0] ? `${image.name}:${image.tags[0]}` : image.name);
  const details = [
    image.changed ? new Date(image.changed).toLocaleString() : '',
    image.bytes === null ? '' : size(image.bytes),
    image.gpu ? 'GPU' : 'CPU',
    image.shared ? t('from', { owner: plain(image.owner) }) : ''
  ].filter(Boolean);
  const copy = button(t('copy'), 'jp-upperdeck-link', () => {
    void navigator.clipboard.writeText(image.reference).then(() => {
      copy.textContent = t('copied');
    });
  });
  return element(
    'li',
    {},
    element('strong', { title: plain(image.reference) }, title),
    image.message ? element('p', {}, plain(image.message)) : null,
    element('p', { class: 'jp-upperdeck-details' }, details.join(' · ')),
    copy
  );
}

export class Panel extends Widget {
  private readonly lists = element('div', { 'aria-live': 'polite' });

  constructor(
    private readonly portal: string,
    save: () => void
  ) {
    super();
    this.id = 'jp-upperdeck-panel';
    this.addClass('jp-upperdeck-panel');
    this.title.caption = t('panel');
    const portalLink = element('a', { href: this.portal, target: '_blank', rel: 'noopener' }, t('manage'));
    this.node.append(
      element(
        'div',
        { class: 'jp-upperdeck-actions' },
        button(t('save'), 'jp-mod-styled jp-mod-accept', save),
        button(t('refresh'), 'jp-mod-styled', () => void this.refresh())
      ),
      this.lists,
      element('p', {}, portalLink)
    );
  }

  /** Reads the list again. */
  async refresh(): Promise<void> {
    try {
      const found = (await images()).images;
      const part = (shared: boolean): (HTMLElement | null)[] => {
        const rows = found.filter(image => image.shared === shared);
        if (rows.length === 0) {
          return shared ? [] : [element('p', {}, t('none'))];
        }
        return [element('h3', {}, t(shared ? 'shared' : 'mine')), element('ul', {}, ...rows.map(row))];
      };
      this.lists.replaceChildren(...[...part(false), ...part(true)].filter((node): node is HTMLElement => node !== null));
    } catch (error) {
      const refused = error instanceof Refused ? error : new Refused(500, { detail: String(error) });
      this.lists.replaceChildren(element('p', { role: 'alert' }, plain(explain(refused.code, refused.message))));
    }
  }

  protected override onAfterShow(): void {
    void this.refresh();
  }
}

// The bar in the status bar, which shows it while a save is under way.

import { Widget } from '@lumino/widgets';

import { Save } from './api';
import { button, element } from './element';
import { Saving, doing, share } from './saving';
import { t } from './words';

export class Status extends Widget {
  private readonly text = element('span', { class: 'jp-upperdeck-text', role: 'status' });
  private readonly bar = element('progress', { max: '1' });

  constructor(saving: Saving) {
    super();
    this.addClass('jp-upperdeck-status');
    const stop = button('×', 'jp-upperdeck-stop', () => void saving.cancel().catch(() => undefined));
    stop.title = t('stop');
    stop.setAttribute('aria-label', t('stop'));
    this.bar.setAttribute('aria-label', t('saveShort'));
    this.node.append(this.text, this.bar, stop);
    saving.changed.connect((_, save) => this.tell(save));
  }

  private tell(save: Save | null): void {
    if (save === null) {
      return;
    }
    const done = share(save);
    const left = save.progress?.seconds_left;
    const percent = done === null ? '' : ` ${Math.floor(done * 100)} %`;
    this.text.textContent = doing(save) + percent + (left ? `, ${t('left', { seconds: Math.ceil(left) })}` : '');
    if (done === null) {
      this.bar.removeAttribute('value');
    } else {
      this.bar.value = done;
    }
  }
}

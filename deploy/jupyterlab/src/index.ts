// Saves the environment of a session from within JupyterLab.

import { ILabShell, JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { CommandToolbarButton, ICommandPalette, Notification } from '@jupyterlab/apputils';
import { ILauncher } from '@jupyterlab/launcher';
import { IMainMenu } from '@jupyterlab/mainmenu';
import { IStatusBar } from '@jupyterlab/statusbar';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';
import { saveIcon } from '@jupyterlab/ui-components';
import { Signal } from '@lumino/signaling';

import { Contents, Refused, Save, contents } from './api';
import { ask } from './dialog';
import { plain } from './element';
import { Panel } from './panel';
import { Saving, explain } from './saving';
import { Status } from './status';
import { choose, t } from './words';

const COMMAND = 'upperdeck:save';
/** How often, and how many times, a session that the service does not know yet is asked about. */
const LOOK_MS = 5000;
const LOOKS = 24;

/** Waits until the service knows this session. Returns null where there is no such service. */
async function known(): Promise<Contents | null> {
  for (let look = 0; look < LOOKS; look += 1) {
    try {
      return await contents();
    } catch (error) {
      if (error instanceof Refused && error.code === 'not_set_up') {
        return null;
      }
    }
    await new Promise(over => setTimeout(over, LOOK_MS));
  }
  return null;
}

function announce(save: Save, spawn: string): void {
  const image = plain(`${save.name}:${save.tag}`);
  if (save.state === 'succeeded') {
    Notification.success(t('done', { image }), {
      autoClose: false,
      actions: [{ label: t('spawn'), callback: () => void window.open(spawn, '_blank', 'noopener') }]
    });
  } else if (save.state === 'failed') {
    const reason = explain(save.error?.code ?? '', plain(save.error?.message ?? ''));
    Notification.error(t('failed', { reason }), { autoClose: false });
  } else {
    Notification.info(t('cancelled'));
  }
}

const plugin: JupyterFrontEndPlugin<void> = {
  id: 'jupyterlab-upperdeck:plugin',
  description: 'Saves the environment of a session as an image.',
  autoStart: true,
  optional: [ITranslator, ICommandPalette, IMainMenu, ILauncher, IStatusBar, ILabShell],
  activate: (
    app: JupyterFrontEnd,
    translator: ITranslator | null,
    palette: ICommandPalette | null,
    menu: IMainMenu | null,
    launcher: ILauncher | null,
    statusBar: IStatusBar | null
  ) => {
    choose((translator ?? nullTranslator).languageCode, navigator.language);
    const saving = new Saving();
    const shown = new Signal<Saving, void>(saving);
    saving.changed.connect(() => shown.emit());
    let spawn = '';
    app.commands.addCommand(COMMAND, {
      label: args => (args.toolbar ? t('saveShort') : t('save')),
      caption: t('saveCaption'),
      icon: saveIcon,
      execute: () => ask(contents, wanted => saving.begin(wanted))
    });
    palette?.addItem({ command: COMMAND, category: 'upperdeck' });
    menu?.fileMenu.addGroup([{ command: COMMAND }], 45);
    launcher?.add({ command: COMMAND, category: 'Other', rank: 50 });
    statusBar?.registerStatusItem('jupyterlab-upperdeck:status', {
      item: new Status(saving),
      align: 'left',
      rank: 5,
      isActive: () => saving.current !== null,
      activeStateChanged: shown
    });
    saving.finished.connect((_, save) => announce(save, spawn));
    const button = new CommandToolbarButton({ commands: app.commands, id: COMMAND, args: { toolbar: true } });
    button.id = 'jp-upperdeck-top';
    button.addClass('jp-upperdeck-top');
    app.shell.add(button, 'top', { rank: 1000 });
    void app.restored.then(known).then(found => {
      if (found === null) {
        return;
      }
      spawn = found.spawn;
      if (found.save) {
        saving.follow(found.save);
      }
      const panel = new Panel(found.portal, () => void app.commands.execute(COMMAND));
      panel.title.icon = saveIcon;
      app.shell.add(panel, 'left', { rank: 600 });
      saving.finished.connect(() => void panel.refresh());
    });
  }
};

export default plugin;

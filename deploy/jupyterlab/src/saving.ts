// The save that is under way: requested, followed to its end over lost connections, and told to whoever listens.

import { ISignal, Signal } from '@lumino/signaling';

import { Refused, Save, Wanted, cancel, ended, events, find, pressed, save } from './api';
import { Word, isWord, t } from './words';

const PAUSE_MS = 1000;
const LONGEST_PAUSE_MS = 15_000;

/** Returns what went wrong in plain words, and the service's own sentence beside it. */
export function explain(code: string, detail: string): string {
  if (isWord(code)) {
    return detail ? `${t(code)} ${t('details', { detail })}` : t(code);
  }
  return detail;
}

/** Returns what a save is doing. */
export function doing(save: Save): string {
  if (save.state !== 'running') {
    if (save.waiting?.reason === 'retry') {
      return t('retrying');
    }
    return save.place ? t('place', { count: save.place }) : t('queued');
  }
  const phases: Record<string, Word> = {
    locating: 'locating',
    scanning: 'scanning',
    streaming: 'streaming',
    base: 'basePhase',
    finishing: 'finishing'
  };
  return t(phases[save.phase ?? ''] ?? 'streaming');
}

/** Returns how much is done, from 0 to 1; null while that is not known. */
export function share(save: Save): number | null {
  const { bytes_done: done = 0, bytes_total: total = 0 } = save.progress ?? {};
  return total > 0 ? Math.min(1, done / total) : null;
}

export class Saving {
  private readonly heard = new Signal<this, Save | null>(this);
  private readonly over = new Signal<this, Save>(this);
  private now: Save | null = null;
  private following: string | null = null;

  /** Emits each state of the save, and null when there is none any more. */
  get changed(): ISignal<this, Save | null> {
    return this.heard;
  }

  /** Emits the save at its end, once. */
  get finished(): ISignal<this, Save> {
    return this.over;
  }

  get current(): Save | null {
    return this.now;
  }

  /** Requests a save and follows it. Fails with Refused. */
  async begin(wanted: Wanted): Promise<void> {
    const key = pressed();
    let begun: Save;
    try {
      begun = await save(wanted, key);
    } catch (error) {
      // Another page of this session began one.
      if (error instanceof Refused && error.code === 'conflict' && error.save) {
        this.follow(await find(error.save));
        return;
      }
      throw error;
    }
    this.follow(begun);
  }

  /** Follows a save that was begun, here or elsewhere. */
  follow(save: Save): void {
    if (ended(save) || this.following === save.id) {
      return;
    }
    this.following = save.id;
    this.tell(save);
    void this.watch(save.id);
  }

  async cancel(): Promise<void> {
    if (this.now) {
      await cancel(this.now.id);
    }
  }

  private tell(save: Save): void {
    this.now = save;
    this.heard.emit(save);
  }

  private async watch(id: string): Promise<void> {
    for (let pause = PAUSE_MS; ; pause = Math.min(pause * 2, LONGEST_PAUSE_MS)) {
      try {
        await events(id, heard => {
          pause = PAUSE_MS;
          this.tell(heard);
        });
        const last = await find(id);
        if (ended(last)) {
          this.end(last);
          return;
        }
        this.tell(last);
      } catch (error) {
        if (error instanceof Refused && error.status < 500 && error.status !== 429) {
          // It cannot be followed any more, e.g. because the session was restarted under this page.
          this.end(null);
          return;
        }
      }
      await new Promise(over => setTimeout(over, pause));
    }
  }

  private end(save: Save | null): void {
    this.now = null;
    this.following = null;
    this.heard.emit(null);
    if (save) {
      this.over.emit(save);
    }
  }
}

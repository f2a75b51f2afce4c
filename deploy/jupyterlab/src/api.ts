// Calls to this server's own extension, which passes them to the hub's service. No token but the server's own is in the page.

import { URLExt } from '@jupyterlab/coreutils';
import { ServerConnection } from '@jupyterlab/services';

export interface Reason {
  code: string;
  detail: string;
  values: Record<string, string>;
}

export interface Unsaved {
  path: string;
  kind: string;
  data: boolean;
}

export interface PackageChange {
  name: string;
  version: string | null;
  change: 'added' | 'removed' | 'changed';
}

export interface Session {
  id: string;
  image: string | null;
  node: string;
  upper_bytes: number | null;
  upper_entries: number | null;
  suggested_name: string;
  suggested_tag: string;
  unsaved: Unsaved[];
  unsaved_more: number;
  problem: string | null;
  next: { bytes: number | null; delta: boolean; last_seconds: number | null } | null;
}

export interface Save {
  id: string;
  state: 'queued' | 'assigned' | 'running' | 'succeeded' | 'failed' | 'cancelled';
  phase: string | null;
  name: string;
  tag: string;
  place: number | null;
  waiting: { reason: string } | null;
  progress: { bytes_done: number; bytes_total: number; seconds_left: number | null } | null;
  result: { reference: string; layer_bytes: number } | null;
  error: { code: string; message: string } | null;
  warnings: { code: string; message: string }[];
}

export interface Contents {
  user: string;
  server: string;
  session: Session;
  packages: { packages: PackageChange[]; more: number } | null;
  start: { starts: boolean | null; reasons: Reason[] };
  save: Save | null;
  spawn: string;
  portal: string;
}

export interface SavedImage {
  key: string;
  name: string;
  tags: string[];
  reference: string;
  changed: string;
  bytes: number | null;
  gpu: boolean;
  message: string;
  shared: boolean;
  owner: string;
}

export interface Wanted {
  name?: string;
  tag?: string;
  message?: string;
  replace?: string;
}

/** A reply that is no success, as the manager's problem. */
export class Refused extends Error {
  readonly status: number;
  readonly code: string;
  readonly existing: string | null;
  readonly save: string | null;

  constructor(status: number, body: Record<string, unknown>) {
    super(typeof body.detail === 'string' ? body.detail : `HTTP ${status}`);
    this.status = status;
    this.code = typeof body.code === 'string' ? body.code : status >= 500 ? 'unavailable' : 'invalid';
    const existing = body.existing as { digest?: unknown } | null | undefined;
    this.existing = typeof existing?.digest === 'string' ? existing.digest : null;
    this.save = typeof body.save === 'string' ? body.save : null;
  }
}

const settings = ServerConnection.makeSettings();
const address = (path: string): string => URLExt.join(settings.baseUrl, 'upperdeck', path);

async function request(method: string, path: string, body?: unknown, more: RequestInit = {}): Promise<Response> {
  const init: RequestInit = { method, cache: 'no-store', ...more };
  if (body !== undefined) {
    init.body = JSON.stringify(body);
    init.headers = { 'Content-Type': 'application/json', ...more.headers };
  }
  let response: Response;
  try {
    response = await ServerConnection.makeRequest(address(path), init, settings);
  } catch (error) {
    throw new Refused(503, { code: 'unavailable', detail: String(error) });
  }
  if (!response.ok) {
    throw new Refused(response.status, (await response.json().catch(() => ({}))) as Record<string, unknown>);
  }
  return response;
}

const json = async <T>(response: Promise<Response>): Promise<T> => (await (await response).json()) as T;

export const contents = (): Promise<Contents> => json(request('GET', 'session'));
export const images = (): Promise<{ images: SavedImage[] }> => json(request('GET', 'images'));
export const find = (id: string): Promise<Save> => json(request('GET', `saves/${encodeURIComponent(id)}`));
export const cancel = (id: string): Promise<Save> => json(request('DELETE', `saves/${encodeURIComponent(id)}`));

/** Requests a save. `key` lets the same press of the button be sent again without a second save. */
export const save = (wanted: Wanted, key: string): Promise<Save> =>
  json(request('POST', 'saves', wanted, { headers: { 'Idempotency-Key': key } }));

/** A key for one press of a button. */
export const pressed = (): string =>
  [...crypto.getRandomValues(new Uint8Array(16))].map(byte => byte.toString(16).padStart(2, '0')).join('');

export const ended = (save: Save): boolean => ['succeeded', 'failed', 'cancelled'].includes(save.state);

/** Reads the events of a save until its end or that of the connection; `hear` gets each state. */
export async function events(id: string, hear: (save: Save) => void): Promise<void> {
  const response = await request('GET', `saves/${encodeURIComponent(id)}/events`, undefined, {
    headers: { Accept: 'text/event-stream' }
  });
  if (response.status === 204 || !response.body) {
    return;
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ''; ; ) {
    const part = await reader.read();
    if (part.done) {
      return;
    }
    const said = (text + part.value).split('\n\n');
    text = said.pop() ?? '';
    for (const event of said) {
      const lines = event.split('\n').filter(line => line.startsWith('data:'));
      if (lines.length > 0) {
        hear(JSON.parse(lines.map(line => line.slice(5).trim()).join('\n')) as Save);
      }
    }
  }
}

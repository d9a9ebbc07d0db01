// Requests to the service. Every failure is a ServiceError with the words of the command line.

export class ServiceError extends Error {
  /**
   * @param {string} message
   * @param {string} [hint]
   */
  constructor(message, hint) {
    super(message);
    this.hint = hint;
  }
}

/** The service cannot be reached. */
export class ConnectionLost extends ServiceError {}

/**
 * @typedef {{id: number, name: string, color: [number, number, number]}} LabelClass
 * @typedef {{name: string, license: string, native_size: number, backend: string, device: string, precision: string,
 *   provider: string, choices: string[], notes: string[], version: string, last_milliseconds: number | null,
 *   classes: {name: string, void_id: number | null, classes: LabelClass[]},
 *   limits: {megapixels: number, request_bytes: number, seconds: number, queue: number}}} Model
 * @typedef {{top: number, left: number, height: number, width: number, levels: object[], cascade: boolean}} WindowReport
 * @typedef {{windows: WindowReport[], tiling: string, backend: string, precision: string, provider: string,
 *   milliseconds: Record<string, number>, notes: string[]}} Report
 * @typedef {{blob: Blob, width: number, height: number, report: Report, notes: string[],
 *   tiles: {top: number, left: number, size: number}[]}} EditResult
 */

/**
 * @param {string} path
 * @param {RequestInit} [options]
 */
async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new ConnectionLost("the server does not answer", "was it stopped? start `spmdeploy studio` again: this page waits for it and keeps your work");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

/** @param {Response} response */
async function failure(response) {
  try {
    const problem = await response.json();
    return new ServiceError(problem.detail ?? response.statusText, problem.hint);
  } catch {
    return new ServiceError(`the server answered ${response.status} ${response.statusText}`);
  }
}

/** @returns {Promise<Model>} */
export async function fetchModel() {
  return (await request("/v1/model")).json();
}

/** @returns {Promise<{name: string, title: string}[]>} */
export async function fetchSamples() {
  return (await request("/v1/samples")).json();
}

/**
 * @param {string} name
 * @param {"photo" | "labels"} part
 */
export async function fetchSample(name, part) {
  return (await request(`/v1/samples/${name}/${part}`)).blob();
}

/**
 * @param {Blob} blob
 * @param {string} name
 * @returns {Promise<{width: number, height: number, notes: string[]}>}
 */
export async function checkPhoto(blob, name) {
  return (await request("/v1/photos", { method: "POST", body: blob, headers: fileHeaders(name) })).json();
}

/**
 * @param {Blob} blob
 * @param {string} name
 * @param {boolean} colors
 */
export async function readLabels(blob, name, colors) {
  const response = await request(`/v1/labels?colors=${colors}`, { method: "POST", body: blob, headers: fileHeaders(name) });
  return {
    ids: new Uint8Array(await response.arrayBuffer()),
    width: Number(response.headers.get("x-width")),
    height: Number(response.headers.get("x-height")),
  };
}

/** @param {string} name */
function fileHeaders(name) {
  return { "content-type": "application/octet-stream", "x-file-name": name.replace(/[^\x20-\x7e]/g, "?") };
}

/**
 * @param {FormData} form
 * @param {(done: number, total: number) => void} progress
 * @param {AbortSignal} signal
 * @returns {Promise<EditResult>}
 */
export async function runEdit(form, progress, signal) {
  const headers = { accept: "application/x-ndjson" };
  const response = await request("/v1/edits", { method: "POST", body: form, headers, signal });
  const decoder = /** @type {ReadableWritablePair<string, Uint8Array>} */ (/** @type {unknown} */ (new TextDecoderStream()));
  const reader = /** @type {ReadableStream<Uint8Array>} */ (response.body).pipeThrough(decoder).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error instanceof DOMException && error.name === "AbortError") throw error;
      throw interrupted();
    });
    text += value ?? "";
    const lines = text.split("\n");
    text = lines.pop() ?? "";
    for (const line of lines) {
      const message = JSON.parse(line);
      if ("done" in message) progress(message.done, message.total);
      else if ("detail" in message) throw new ServiceError(message.detail, message.hint);
      else return { ...message, blob: await base64Blob(message.image) };
    }
    if (done) throw interrupted();
  }
}

function interrupted() {
  return new ConnectionLost("the server stopped in the middle of the edit", "start it again: this page waits for it and keeps your work");
}

/** @param {FormData} form */
export async function packSession(form) {
  return (await request("/v1/sessions", { method: "POST", body: form })).blob();
}

/** @param {string} text */
async function base64Blob(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return new Blob([bytes], { type: "image/png" });
}

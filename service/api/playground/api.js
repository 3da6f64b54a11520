/**
 * The service's HTTP API: the served model, readiness, and a run with its progress. Addresses are relative to the
 * page, so that it works behind a proxy that serves it under a prefix. Nothing here touches the page.
 */

import { eventsOf } from "./events.js";

const KEY = "inpaint-key";

/** An answer that is no success, as the service's problem document says it. */
export class ServiceError extends Error {
  /**
   * @param {{status: number, code: string, detail: string, errors: {field: string, message: string}[]}} problem
   * @param {number | null} retryAfter seconds
   */
  constructor(problem, retryAfter = null) {
    super(problem.detail);
    this.status = problem.status;
    this.code = problem.code;
    this.errors = problem.errors ?? [];
    this.retryAfter = retryAfter;
  }
}

/** The key of this tab, or an empty string. */
export function key() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

/** Keep a key for this tab; an empty one forgets it. */
export function setKey(value) {
  if (/[^\x21-\xff]/.test(value)) throw new Error("A key holds no such characters.");
  try {
    if (value) sessionStorage.setItem(KEY, value);
    else sessionStorage.removeItem(KEY);
  } catch {
    throw new Error("This browser keeps nothing for this page, and so no key.");
  }
}

/** The address of a path of the service. */
export function address(path) {
  return new URL(path, document.baseURI).href;
}

/** The served model, as `/v1/models` tells of it. */
export async function servedModel() {
  return (await (await get("v1/models")).json()).data[0];
}

/** Names of the LoRAs that a request can name. */
export async function adapterNames() {
  return (await (await get("v1/adapters")).json()).data.map((adapter) => adapter.name);
}

/** States of the workers, also while none is ready. */
export async function workerStates() {
  const answer = await send("readyz");
  return ((await answer.json()).workers ?? []).map((worker) => worker.state);
}

/**
 * Run a request.
 * @param {FormData} form
 * @param {AbortSignal} signal aborting it hangs up, upon which the service drops the request
 * @param {(event: "queued" | "progress", data: any) => void} onEvent
 * @returns {Promise<any>} the answer: images, parameters, timings
 */
export async function inpaint(form, signal, onEvent) {
  const answer = await send("v1/inpaint", {
    method: "POST",
    body: form,
    signal,
    headers: { Accept: "text/event-stream" },
  });
  if (!answer.ok) throw await failure(answer);
  for await (const { event, data } of eventsOf(answer.body)) {
    if (event === "completed") return JSON.parse(data);
    if (event === "failed") throw new ServiceError(JSON.parse(data));
    onEvent(event, JSON.parse(data));
  }
  throw new Error("The connection ended before the picture was done.");
}

async function get(path) {
  const answer = await send(path);
  if (!answer.ok) throw await failure(answer);
  return answer;
}

async function send(path, { headers = {}, ...options } = {}) {
  const authorization = key() ? { Authorization: `Bearer ${key()}` } : {};
  try {
    return await fetch(address(path), { ...options, headers: { ...headers, ...authorization }, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(navigator.onLine ? "The service cannot be reached." : "This device is offline.", { cause: error });
  }
}

async function failure(answer) {
  const seconds = Number(answer.headers.get("Retry-After"));
  const retryAfter = seconds > 0 ? seconds : null;
  try {
    return new ServiceError(await answer.json(), retryAfter);
  } catch {
    // Whatever stands between the browser and the service has answered.
    return new ServiceError({ status: answer.status, code: "", detail: `HTTP ${answer.status}`, errors: [] }, retryAfter);
  }
}

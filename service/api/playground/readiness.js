/**
 * Waiting for the service: until it can be reached, has loaded its model, and accepts the key.
 */

import * as api from "./api.js";
import { byId } from "./elements.js";

const POLL_MS = 1500;
const UNAUTHORIZED = 401;

/**
 * Wait until the service is ready, and say on the page what is being waited for.
 * @param {() => Promise<void>} askForKey resolves once there is a key to try
 * @returns {Promise<{model: any, loraNames: string[]}>}
 */
export async function whenReady(askForKey) {
  const line = byId("readiness");
  for (;;) {
    try {
      const [model, loraNames] = await Promise.all([api.servedModel(), api.adapterNames()]);
      line.hidden = true;
      return { model, loraNames };
    } catch (error) {
      if (error.status === UNAUTHORIZED) {
        line.hidden = true;
        await askForKey();
        continue;
      }
      const text = await why(error);
      if (line.textContent !== text) line.textContent = text; // Else it would be read aloud again.
      line.hidden = false;
    }
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
}

async function why(error) {
  if (error.code !== "not_ready") return error.message;
  try {
    const states = await api.workerStates();
    return `The service is not ready yet (${states.join(", ") || "no worker"}). This page waits for it.`;
  } catch {
    return "The service is not ready yet. This page waits for it.";
  }
}

/**
 * What went wrong, in the service's words: beside the field that it names, or in one line below the button.
 */

import { ServiceError } from "./api.js";
import { byId } from "./elements.js";

/** Take all messages away. */
export function clearFaults() {
  for (const slot of document.querySelectorAll("[data-error-for]")) slot.textContent = "";
  for (const control of document.querySelectorAll("[aria-invalid]")) control.removeAttribute("aria-invalid");
  byId("problem").textContent = "";
}

/**
 * Show why a run failed.
 * @param {Error} error
 */
export function showFault(error) {
  const named = error instanceof ServiceError ? error.errors : [];
  const left = named.filter(({ field, message }) => !showFieldFault(field, message));
  document.querySelector("[aria-invalid]")?.focus();
  // The service names the field in its sentence, which then need not stand beside the field.
  if (named.length === 0 || left.length) byId("problem").textContent = sentence(error);
}

/**
 * Show what is wrong with one field.
 * @param {string} field the API's name
 * @param {string} message
 * @returns {boolean} whether the page has a place for it
 */
export function showFieldFault(field, message) {
  const slot = document.querySelector(`[data-error-for="${CSS.escape(field)}"]`);
  if (!slot) return false;
  slot.textContent = message.replace(`${field}: `, "");
  const folded = slot.closest("details");
  if (folded) folded.open = true;
  document.querySelector(`[name="${CSS.escape(field)}"]`)?.setAttribute("aria-invalid", "true");
  return true;
}

function sentence(error) {
  const again = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  return `${error.message}${again}`;
}

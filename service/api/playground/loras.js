/**
 * Which LoRAs a request names, and how strongly each counts.
 */

import { byId, make } from "./elements.js";

const DEFAULT_SCALE = "1";

export class Loras {
  #names = [];
  #onChange;

  /** @param {() => void} onChange */
  constructor(onChange) {
    this.#onChange = onChange;
    byId("lora-add").addEventListener("change", (event) => {
      this.#addRow(event.target.value, DEFAULT_SCALE);
      this.#changed();
    });
  }

  /** Offer these names. */
  offer(names) {
    this.#names = names;
    byId("loras").hidden = names.length === 0;
    this.#showChoices();
  }

  /** @returns {{name: string, scale: string}[]} */
  get chosen() {
    return [...byId("lora-rows").children].map((row) => ({
      name: row.dataset.name,
      scale: row.querySelector("input").value,
    }));
  }

  set chosen(loras) {
    byId("lora-rows").replaceChildren();
    for (const { name, scale } of loras) this.#addRow(name, scale);
    this.#showChoices();
  }

  /** The form field's value: JSON, empty without any. What is no number is left to the service to refuse. */
  get field() {
    const loras = this.chosen.map(({ name, scale }) => ({ name, scale: scale === "" ? 1 : Number(scale) }));
    return loras.length ? JSON.stringify(loras) : "";
  }

  #addRow(name, scale) {
    const input = make("input", { type: "number", min: -10, max: 10, step: 0.1, value: scale, "aria-label": `Scale of ${name}` });
    const remove = make("button", { type: "button", "aria-label": `Remove ${name}` }, "Remove");
    const row = make("div", { className: "lora" }, make("span", {}, name), input, remove);
    row.dataset.name = name;
    remove.addEventListener("click", () => {
      row.remove();
      this.#changed();
    });
    byId("lora-rows").append(row);
  }

  #changed() {
    this.#showChoices();
    this.#onChange();
  }

  #showChoices() {
    const taken = new Set(this.chosen.map(({ name }) => name));
    const rest = this.#names.filter((name) => !taken.has(name));
    const options = rest.map((name) => make("option", { value: name }, name));
    byId("lora-add").replaceChildren(make("option", { value: "", disabled: true, selected: true }, "Add a LoRA …"), ...options);
    byId("lora-add").hidden = rest.length === 0;
  }
}

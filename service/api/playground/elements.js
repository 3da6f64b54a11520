/**
 * Shorthands for the page's elements. The page has no other way of making or finding them.
 */

/**
 * The element with this id; a missing one is a fault of the page and must not go unnoticed.
 * @param {string} id
 * @returns {any}
 */
export function byId(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`the page has no #${id}`);
  return found;
}

/**
 * A new element. Text is set as text, never as HTML.
 * @param {string} tag
 * @param {Record<string, any>} properties
 * @param {...(Node|string)} children
 */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

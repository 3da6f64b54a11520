/**
 * Server-sent events out of a stream that arrives in pieces, as the HTML standard reads them; `EventSource` itself
 * can neither post nor send a key.
 */

export class EventParser {
  #rest = "";

  /**
   * Take the next piece of the stream's text.
   * @param {string} text
   * @returns {{event: string, data: string}[]} the events that are complete now
   */
  push(text) {
    // A long line arrives in many pieces: only the new one can hold its end.
    const from = Math.max(0, this.#rest.length - 3);
    this.#rest += text;
    const events = [];
    const blank = /\r\n\r\n|\n\n|\r\r/g;
    blank.lastIndex = from;
    let start = 0;
    for (let found = blank.exec(this.#rest); found; found = blank.exec(this.#rest)) {
      const event = parse(this.#rest.slice(start, found.index));
      if (event) events.push(event);
      start = found.index + found[0].length;
    }
    this.#rest = this.#rest.slice(start);
    return events;
  }
}

/** One block of lines; null for one without data, such as a comment that keeps the connection alive. */
function parse(block) {
  let event = "message";
  const data = [];
  for (const line of block.split(/\r\n|\n|\r/)) {
    const colon = line.indexOf(":");
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (name === "event") event = value;
    else if (name === "data") data.push(value);
  }
  return data.length ? { event, data: data.join("\n") } : null;
}

/**
 * The events of a response's body.
 * @param {ReadableStream<Uint8Array>} body
 */
export async function* eventsOf(body) {
  const parser = new EventParser();
  const decoder = new TextDecoder();
  const reader = body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield* parser.push(decoder.decode(value, { stream: true }));
    }
  } finally {
    reader.cancel().catch(() => {}); // It may have been aborted already.
  }
}

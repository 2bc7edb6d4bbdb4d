// Parses sequence diagrams with the real Mermaid: `node parse.mjs FILE…`, where a FILE is Mermaid text or an insta snapshot of it.
//
// A diagram passes if Mermaid takes it and sees in it exactly what is written, one statement a line: a name that smuggled in a
// statement, a lifeline or an element of HTML fails, even if the result parses. Exits with 1 and `FILE:LINE: why` for each failure.

import { readFileSync } from "node:fs";
import { JSDOM } from "jsdom";

// Mermaid sanitises text and checks colours with what a browser offers.
const { window } = new JSDOM("<!doctype html><body></body>");
window.CSS = { supports: () => true };
globalThis.window = window;
globalThis.document = window.document;
globalThis.Option = window.Option;
const { default: mermaid } = await import("mermaid");

const MAX_TEXT_SIZE = 50_000;

class Fault extends Error {
  constructor(line, why) {
    super(why);
    this.line = line;
  }
}

/** The text of a diagram, and how many lines of the file come before it. */
function read(path) {
  const text = readFileSync(path, "utf8");
  if (!path.endsWith(".snap")) return { text, offset: 0 };
  const header = text.match(/^---\n[^]*?\n---\n/)?.[0] ?? "";
  return { text: text.slice(header.length), offset: header.split("\n").length - 1 };
}

/** What each line of ours says, by its first word. */
function written(text) {
  const counts = { participants: 0, boxes: 0, messages: 0, notes: 0, loops: 0, rects: 0, labels: [] };
  text.split("\n").forEach((line, index) => {
    const statement = line.trim();
    const message = statement.match(/^[A-Z]\d+(?:-->>|->>|-x)[+-]?[A-Z]\d+: (.*)$/);
    if (message) {
      counts.messages += 1;
      counts.labels.push({ line: index + 1, label: message[1] });
    } else if (statement.startsWith("participant ")) counts.participants += 1;
    else if (statement.startsWith("box ")) counts.boxes += 1;
    else if (statement.startsWith("Note over ")) counts.notes += 1;
    else if (statement.startsWith("loop ")) counts.loops += 1;
    else if (statement.startsWith("rect ")) counts.rects += 1;
    else if (!/^(sequenceDiagram|autonumber|end|title .*|deactivate [A-Z]\d+|)$/.test(statement)) {
      throw new Fault(index + 1, `not a statement of ours: ${statement.slice(0, 100)}`);
    }
  });
  return counts;
}

/** The same counts, as Mermaid understood the text. */
function understood(db) {
  const { LINETYPE } = db;
  const arrows = [LINETYPE.SOLID, LINETYPE.DOTTED, LINETYPE.SOLID_CROSS, LINETYPE.DOTTED_CROSS];
  const messages = db.getMessages();
  const count = (...types) => messages.filter((message) => types.includes(message.type)).length;
  return {
    participants: db.getActors().size,
    boxes: db.getBoxes().length,
    messages: count(...arrows),
    notes: count(LINETYPE.NOTE),
    loops: count(LINETYPE.LOOP_START),
    rects: count(LINETYPE.RECT_START),
    labels: messages.filter((message) => arrows.includes(message.type)).map((message) => message.message),
  };
}

/** Mermaid's placeholders for entity codes, as the reader sees them. */
const shown = (label) =>
  label.replace(/\ufb02\u00b0\u00b0(\d+)\u00b6\u00df/g, (_, code) => String.fromCodePoint(Number(code)));
const meant = (label) => label.replace(/#(\d+);/g, (_, code) => String.fromCodePoint(Number(code)));

async function check(text) {
  if ([...text].length >= MAX_TEXT_SIZE) throw new Fault(1, `${[...text].length} characters`);
  let diagram;
  try {
    await mermaid.parse(text);
    diagram = await mermaid.mermaidAPI.getDiagramFromText(text);
  } catch (error) {
    const line = error?.hash?.loc?.first_line ?? Number(/line (\d+)/.exec(error?.message)?.[1] ?? 1);
    throw new Fault(line, String(error?.message ?? error).split("\n").slice(0, 3).join(" | "));
  }
  const { labels, ...counts } = written(text);
  const { labels: seen, ...counted } = understood(diagram.db);
  for (const [what, count] of Object.entries(counts)) {
    if (counted[what] !== count) throw new Fault(1, `${count} ${what} written, Mermaid sees ${counted[what]}`);
  }
  labels.forEach(({ line, label }, index) => {
    const [want, got] = [meant(label).trim(), shown(seen[index]).trim()];
    if (want !== got) throw new Fault(line, `written ${JSON.stringify(want)}, Mermaid sees ${JSON.stringify(got)}`);
  });
}

const paths = process.argv.slice(2);
if (paths.length === 0) {
  console.error("usage: node parse.mjs FILE…");
  process.exit(2);
}
let failures = 0;
for (const path of paths) {
  const { text, offset } = read(path);
  try {
    await check(text);
  } catch (fault) {
    failures += 1;
    console.error(`${path}:${(fault.line ?? 1) + offset}: ${fault.message}`);
  }
}
console.log(`${paths.length - failures} of ${paths.length} diagrams parse`);
process.exit(failures === 0 ? 0 : 1);

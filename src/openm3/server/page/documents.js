// Text files become documents, written into a message as `openm3 ask` writes them.

export class Unreadable extends Error {}

// Far more text than any model takes.
const MOST_BYTES = 64 * 2 ** 20;

// A file's text, its lines ended by \n alone. Throws Unreadable with the reason.
export async function read(file) {
  if (file.size > MOST_BYTES) throw new Unreadable("is larger than 64 MiB");
  let bytes;
  try {
    bytes = new Uint8Array(await file.arrayBuffer());
  } catch {
    throw new Unreadable("is a folder or cannot be read");
  }
  const text = decoded(bytes).replace(/\r\n?/g, "\n");
  if (!text.trim()) throw new Unreadable("is empty");
  return { name: file.name.replace(/[\u0000-\u001f\u007f-\u009f\u2028\u2029]/g, "\ufffd"), text };
}

function decoded(bytes) {
  if (bytes[0] === 0xff && bytes[1] === 0xfe) return new TextDecoder("utf-16le").decode(bytes);
  if (bytes[0] === 0xfe && bytes[1] === 0xff) return new TextDecoder("utf-16be").decode(bytes);
  if (bytes.includes(0)) throw new Unreadable("is no text file");
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    return new TextDecoder("windows-1252").decode(bytes);
  }
}

// Pictures and videos (`shown`: parts), then documents, then the question. One part a document, so that nobody has to
// guess where it ends; the template joins them.
export function userMessage(documents, question, shown = []) {
  if (!documents.length && !shown.length) return { role: "user", content: question };
  const texts = documents.map(({ name, text }) => `File: ${name}\n${text.trimEnd()}\n\n`);
  return { role: "user", content: [...shown, ...[...texts, question].map((text) => ({ type: "text", text }))] };
}

// Pictures and videos that go with a message: read or uploaded, and shown small.

import { upload } from "./api.js";
import { Unreadable } from "./documents.js";
import { element } from "./markdown.js";

// What is larger travels once, as a file of the server's, and not with each turn.
const MOST_SENT = 2 ** 22;
const KINDS = {
  image: ["jpeg", "png", "gif", "webp", "bmp"],
  video: ["mp4", "quicktime", "webm", "x-matroska", "matroska", "x-msvideo", "avi", "vnd.avi"],
};
const ENDS = { mkv: "video", avi: "video", mov: "video" };

// Where each address that was sent is to be seen from: the browser keeps what it stands for.
const local = new Map();

// "image", "video", or null for files of other kinds.
export function kindOf(file) {
  const [kind, form] = file.type.split("/");
  if (KINDS[kind]?.includes(form)) return kind;
  return (!file.type && ENDS[file.name.split(".").pop().toLowerCase()]) || null;
}

// A file as it goes with messages: {kind, name, url, shown}. Throws with the reason where it cannot be sent.
export async function attached(file) {
  const kind = kindOf(file);
  if (!file.size) throw new Unreadable("is empty");
  const url = kind === "image" && file.size <= MOST_SENT ? await dataUri(file) : `mm_file://${await upload(file)}`;
  local.set(url, URL.createObjectURL(file));
  return { kind, name: file.name, url, shown: local.get(url) };
}

// Its part of a message.
export function mediaPart({ kind, url }) {
  return kind === "image" ? { type: "image_url", image_url: { url } } : { type: "video_url", video_url: { url } };
}

// All that a conversation shows, in order: {kind, shown}.
export function shownIn(messages) {
  const parts = messages.flatMap(({ content }) => (Array.isArray(content) ? content : []));
  return parts
    .map((part) => [part.type, (part.image_url ?? part.video_url)?.url])
    .filter(([, url]) => url)
    .map(([type, url]) => ({ kind: type === "image_url" ? "image" : "video", shown: local.get(url) }));
}

// An image or a video that stands still, with a name for those who do not see it.
export function view({ kind, shown }, name) {
  const node = element(kind === "image" ? "img" : "video");
  node.src = shown;
  if (kind === "image") node.alt = name;
  else Object.assign(node, { muted: true, preload: "auto", ariaLabel: name });
  return node;
}

function dataUri(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Unreadable("cannot be read"));
    reader.readAsDataURL(file);
  });
}

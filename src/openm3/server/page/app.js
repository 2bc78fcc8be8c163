// The page: a conversation with the model, its documents, and its settings.

import { Answer, question } from "./answer.js";
import { ApiError, chat, getKey, request, setKey } from "./api.js";
import { read, userMessage } from "./documents.js";
import { element } from "./markdown.js";
import { attached, kindOf, mediaPart, view } from "./media.js";
import { Recording } from "./recording.js";
import { NARROW, Xray } from "./xray.js";

const $ = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en-US");
const SETTINGS = "openm3.settings";
const THEME = "openm3.theme";
const DEFAULTS = { temperature: "1", "max-tokens": "4096", thinking: "adaptive", evidence: true };
const COUNT_DELAY = 400;
// Longer conversations are counted again when documents change, not at each pause in writing.
const COUNTED_WHILE_WRITING = 200_000;

const xray = new Xray();
let messages = [];
let documents = [];
let media = [];
let running = null;
let counting = null;
let countTimer = 0;
let atEnd = true;

async function ask() {
  const text = $("input").value.trim();
  if (!text || running) return;
  const mine = (running = new AbortController());
  const sent = { documents, media };
  const asked = [...messages, userMessage(documents, text, media.map(mediaPart))];
  const shown = question(documents, text, media);
  const answer = new Answer(follow);
  for (const failed of $("log").querySelectorAll("article:has([role=alert])")) failed.remove();
  $("welcome").hidden = true;
  $("log").append(shown, answer.element);
  atEnd = true;
  follow();
  write("");
  attach([], []);
  busy(true);
  const kept = await exchange(asked, answer, mine.signal);
  // Meanwhile a new chat may have begun.
  if (running !== mine) return;
  running = null;
  busy(false);
  if (kept) {
    messages = [...asked, kept];
  } else {
    // Nothing was answered: the message goes back to where it was written.
    shown.remove();
    if (!answer.failed) answer.element.remove();
    if (!$("input").value) write(text);
    attach([...sent.documents, ...documents], [...sent.media, ...media]);
  }
  recount();
}

// Stream one answer. Returns the assistant's message, null if there is none to go on from.
async function exchange(asked, answer, signal) {
  const body = requestBody(asked);
  const recording = body.xray ? new Recording({ messages: asked, thinking: body.thinking }) : null;
  const end = { reason: "", usage: null, evidence: null };
  try {
    for await (const chunk of chat(body, signal)) {
      const choice = chunk.choices?.[0];
      end.usage = chunk.usage ?? end.usage;
      end.reason = choice?.finish_reason ?? end.reason;
      const { ids, blocks, evidence } = choice?.delta?.openm3 ?? {};
      end.evidence = evidence ?? end.evidence;
      if (recording && ids?.length) record(recording, ids, blocks, answer);
      answer.add(choice?.delta ?? {});
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      answer.fail(error.message);
      if (error.status === 401) openSettings("key");
      return null;
    }
    end.reason = "abort";
  } finally {
    recording?.finish();
    if (recording && xray.recording === recording) xray.finish();
  }
  answer.finish(end);
  say(answer.content ? "The answer is complete." : "There is no answer.");
  return answer.message;
}

function requestBody(asked) {
  return {
    model: $("model").value || undefined,
    messages: asked,
    temperature: Number($("temperature").value),
    max_tokens: Number($("max-tokens").value) || undefined,
    thinking: { type: $("thinking").value },
    reasoning_split: true,
    stream_options: { include_usage: true },
    xray: $("xray-on").checked || undefined,
    evidence: $("evidence").checked || undefined,
  };
}

function record(recording, ids, blocks, answer) {
  const isFirst = !recording.length;
  recording.add(ids, blocks);
  if (isFirst) {
    const button = Object.assign(element("button", "X-ray"), { type: "button", className: "open-xray" });
    button.onclick = () => xray.open(recording, button);
    answer.element.append(button);
    // On a wide page there is room for both.
    if (!NARROW.matches) xray.open(recording);
  }
  if (xray.recording === recording) xray.grow();
}

function busy(is) {
  $("log").setAttribute("aria-busy", String(is));
  // The focus stays on the one button that both are.
  const had = document.activeElement === (is ? $("send") : $("stop"));
  $("send").hidden = is;
  $("stop").hidden = !is;
  if (had) (is ? $("stop") : $("send")).focus();
  if (is) say("The model is answering.");
}

function say(text) {
  $("status").textContent = text;
}

// Stay at the end if the reader is there.
function follow() {
  if (atEnd) $("log").scrollTop = $("log").scrollHeight;
}

function reset() {
  running?.abort();
  running = null;
  busy(false);
  xray.close();
  messages = [];
  attach([], []);
  for (const node of [...$("log").children]) if (node.id !== "welcome") node.remove();
  $("welcome").hidden = false;
  say("A new chat.");
  recount();
  $("input").focus();
}

function write(text) {
  $("input").value = text;
  grow();
}

function grow() {
  $("input").style.height = "auto";
  $("input").style.height = `${$("input").scrollHeight}px`;
}

async function addFiles(files) {
  const found = { documents: [], media: [] };
  const notes = [];
  for (const file of files) {
    try {
      if (kindOf(file) === "video") $("notes").textContent = `Uploading ${file.name}…`;
      if (kindOf(file)) found.media.push(await attached(file));
      else found.documents.push(await read(file));
    } catch (error) {
      notes.push(`${file.name} ${error instanceof ApiError ? `was refused: ${error.message}` : error.message}`);
    }
  }
  attach([...documents, ...found.documents], [...media, ...found.media]);
  $("notes").textContent = notes.join(". ");
  recount();
  $("input").focus();
}

// Set what goes with the next message.
function attach(texts, pictures) {
  documents = texts;
  media = pictures;
  const shown = media.map((item) => listed(item, view(item, item.name), element("span", item.name)));
  const named = documents.map((document) => {
    const size = element("small", `${number.format(document.text.length)} characters`);
    return listed(document, element("span", document.name), size);
  });
  $("documents").replaceChildren(...shown, ...named);
  $("notes").textContent = "";
}

function listed(item, ...nodes) {
  const remove = Object.assign(element("button", "×"), { type: "button" });
  remove.setAttribute("aria-label", `Remove ${item.name}`);
  remove.onclick = () => {
    const others = (list) => list.filter((other) => other !== item);
    attach(others(documents), others(media));
    recount();
    $("input").focus();
  };
  return element("li", ...nodes, remove);
}

// Ask how long the next prompt would be; the last question wins.
function recount() {
  clearTimeout(countTimer);
  counting?.abort();
  if (!documents.length && !media.length && !messages.length && !$("input").value.trim()) {
    $("size").textContent = "";
    return;
  }
  countTimer = setTimeout(count, COUNT_DELAY);
}

async function count() {
  counting = new AbortController();
  const prompt = [...messages, userMessage(documents, $("input").value, media.map(mediaPart))];
  try {
    const body = { model: $("model").value || undefined, messages: prompt };
    const { count: tokens, max_model_len: most } = await request("/tokenize", body, counting.signal);
    $("size").textContent = `${number.format(tokens)} tokens${most ? ` of ${number.format(most)}` : ""}`;
    $("size").classList.toggle("error", Boolean(most && tokens >= most));
  } catch {
    // The answer itself will say what is wrong.
    $("size").textContent = "";
  }
}

function openSettings(field) {
  if (!$("settings").open) $("settings").showModal();
  if (field) $(field).focus();
}

function loadSettings() {
  const stored = { ...DEFAULTS, ...JSON.parse(localStorage.getItem(SETTINGS) ?? "{}") };
  for (const name of Object.keys(DEFAULTS)) {
    const control = $(name);
    if (control.type === "checkbox") control.checked = stored[name];
    else control.value = stored[name];
  }
  $("temperature-value").textContent = $("temperature").value;
  $("key").value = getKey();
}

function saveSettings() {
  const value = (control) => (control.type === "checkbox" ? control.checked : control.value);
  const entries = Object.keys(DEFAULTS).map((name) => [name, value($(name))]);
  localStorage.setItem(SETTINGS, JSON.stringify(Object.fromEntries(entries)));
  $("temperature-value").textContent = $("temperature").value;
}

async function loadModels() {
  try {
    const { data } = await request("/v1/models");
    $("model").replaceChildren(...data.map(({ id }) => new Option(id, id)));
    $("model").disabled = data.length < 2;
  } catch (error) {
    if (error.status === 401) openSettings("key");
    else say(error.message);
  }
}

const prefersDark = matchMedia("(prefers-color-scheme: dark)");

function showTheme() {
  const theme = localStorage.getItem(THEME) ?? "";
  document.documentElement.dataset.theme = theme;
  const isDark = theme ? theme === "dark" : prefersDark.matches;
  $("theme").setAttribute("aria-pressed", String(isDark));
  xray.recolor();
}

function listen() {
  $("composer").onsubmit = (event) => {
    event.preventDefault();
    ask();
  };
  $("input").onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    ask();
  };
  $("input").oninput = () => {
    grow();
    const sizes = [...documents.map(({ text }) => text.length), ...media.map(({ url }) => url.length)];
    const length = sizes.reduce((sum, size) => sum + size, JSON.stringify(messages).length);
    if (length < COUNTED_WHILE_WRITING) recount();
  };
  listenToScrolls($("log"));
  $("stop").onclick = () => running?.abort();
  $("new").onclick = reset;
  $("attach").onclick = () => $("files").click();
  $("files").onchange = () => {
    addFiles([...$("files").files]);
    $("files").value = "";
  };
  $("open-settings").onclick = () => openSettings();
  $("settings").onchange = saveSettings;
  $("temperature").oninput = saveSettings;
  $("key").onchange = () => {
    setKey($("key").value.trim());
    loadModels();
  };
  $("theme").onclick = () => {
    localStorage.setItem(THEME, $("theme").getAttribute("aria-pressed") === "true" ? "light" : "dark");
    showTheme();
  };
  prefersDark.onchange = showTheme;
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running && !event.defaultPrevented && !$("settings").open) running.abort();
  });
  listenToDrops();
}

// Going up leaves the end; text that grows below does not.
function listenToScrolls(log) {
  let top = 0;
  log.onscroll = () => {
    if (log.scrollHeight - log.scrollTop - log.clientHeight < 40) atEnd = true;
    else if (log.scrollTop < top) atEnd = false;
    top = log.scrollTop;
  };
  new ResizeObserver(follow).observe(log);
}

function listenToDrops() {
  let depth = 0;
  const show = (change) => {
    depth = Math.max(0, depth + change);
    $("drop").hidden = !depth;
  };
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  document.addEventListener("dragenter", (event) => hasFiles(event) && show(1));
  document.addEventListener("dragleave", (event) => hasFiles(event) && show(-1));
  document.addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
  document.addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    show(-depth);
    addFiles([...event.dataTransfer.files]);
  });
}

listen();
loadSettings();
showTheme();
loadModels();

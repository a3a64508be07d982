// The page of `mmq app`: a conversation with pictures and videos, its answers streamed. It talks to the address that it
// came from alone, and keeps nothing when it is closed.
"use strict";

const WORDS = {
  zh: {
    model: "模型", settings: "设置", system: "系统提示", longest: "回答最长多少 token", temperature: "温度", clear: "清空",
    attached: "已添加", attach: "图片或视频", question: "问题", placeholder: "问一问图片里的内容", send: "发送", stop: "停止",
    remove: "移除", stopped: "已停止", unread: "无法读取这个文件：", broken: "服务器中断了回答", tokens: "token", second: "秒",
  },
  en: {
    send: "Send", stop: "Stop", remove: "Remove", stopped: "stopped", unread: "This file is no picture or video: ", broken: "The server broke off before its answer was done",
    tokens: "tokens", second: "s",
  },
};
const words = { ...WORDS.en, ...(navigator.language.startsWith("zh") ? WORDS.zh : {}) };
const at = (id) => document.getElementById(id);
const conversation = []; // messages as they are sent
let media = []; // of the question that is being written: {kind, url, name}
const CLEARED = "cleared";
let asking = null; // the AbortController of the answer under way

function translate() {
  if (!navigator.language.startsWith("zh")) return;
  document.documentElement.lang = "zh";
  for (const [key, set] of [["say", "textContent"], ["sayTitle", "title"], ["sayPlaceholder", "placeholder"]]) {
    for (const node of document.querySelectorAll(`[data-${key.replace(/[A-Z]/, (c) => "-" + c.toLowerCase())}]`)) {
      node[set] = words[node.dataset[key]];
    }
  }
  for (const node of document.querySelectorAll("[data-say-label]")) node.setAttribute("aria-label", words[node.dataset.sayLabel]);
}

function element({ kind, url, name }) {
  const shown = document.createElement(kind === "video" ? "video" : "img");
  shown.src = url;
  if (kind === "video") { shown.controls = true; shown.muted = true; } else { shown.alt = name; }
  shown.onerror = () => { // what this browser cannot show the model may see all the same
    shown.replaceWith(Object.assign(document.createElement("span"), { textContent: name }));
  };
  return shown;
}

function turn(role, text, shown = []) {
  const box = document.createElement("div");
  box.className = `turn ${role}`;
  for (const item of shown) box.append(element(item));
  const words = document.createElement("p");
  words.textContent = text;
  box.append(words);
  at("log").append(box);
  box.scrollIntoView({ block: "end" });
  return { box, words };
}

function following(change) { // what is below the last line comes into view; who reads further up is left there
  const log = at("log");
  const below = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  change();
  if (below) log.scrollTop = log.scrollHeight;
}

async function attach(files) {
  for (const file of files) {
    const kind = file.type.split("/")[0];
    const url = await new Promise((done) => {
      const reader = new FileReader();
      reader.onload = () => done(reader.result);
      reader.onerror = () => done(null);
      reader.readAsDataURL(file);
    });
    if (url === null || !["image", "video"].includes(kind)) {
      turn("assistant wrong", words.unread + file.name);
      continue;
    }
    media.push({ kind, url, name: file.name });
  }
  showMedia();
}

function showMedia() {
  at("media").replaceChildren(...media.map((item) => {
    const button = document.createElement("button");
    button.type = "button";
    button.title = words.remove;
    button.setAttribute("aria-label", `${words.remove} ${item.name}`);
    const shown = element(item);
    if (item.kind === "video") shown.controls = false;
    button.append(shown);
    button.onclick = () => { media = media.filter((other) => other !== item); showMedia(); };
    return button;
  }));
}

function part({ kind, url }) {
  return { type: `${kind}_url`, [`${kind}_url`]: { url } };
}

async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

async function refusal(reply) {
  const text = await reply.text();
  try { return JSON.parse(text).error.message; } catch { return `${reply.status}: ${text.slice(0, 300)}`; }
}

async function answer() {
  const system = at("system").value.trim();
  const body = {
    model: at("model").value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...conversation],
    max_tokens: Number(at("tokens").value) || 512,
    temperature: Number(at("temperature").value) || 0,
    stream: true,
    stream_options: { include_usage: true },
  };
  const { signal } = (asking = new AbortController());
  at("send").textContent = words.stop;
  const { box, words: shown } = turn("assistant", "");
  box.setAttribute("aria-busy", "true");
  let text = "", note = "", wrong = "", finish = "", usage = null, first = 0;
  try {
    const reply = await fetch("v1/chat/completions", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
    });
    if (!reply.ok) throw new Error(await refusal(reply));
    for await (const event of events(reply)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage || usage;
      finish = event.choices?.[0]?.finish_reason || finish;
      const piece = event.choices?.[0]?.delta?.content;
      if (!piece) continue;
      first = first || performance.now();
      text += piece;
      following(() => { shown.textContent = text; });
    }
    if (!finish) throw new Error(words.broken);
  } catch (error) {
    if (signal.aborted) note = words.stopped;
    else wrong = error.message;
  }
  if (usage && usage.completion_tokens > 1) {
    const seconds = (performance.now() - first) / 1000;
    note = `${usage.completion_tokens} ${words.tokens}, ${((usage.completion_tokens - 1) / seconds).toFixed(0)}/${words.second}`;
  }
  if ((text || finish) && signal.reason !== CLEARED) conversation.push({ role: "assistant", content: text });
  if (note) following(() => box.append(Object.assign(document.createElement("small"), { textContent: note })));
  if (wrong) {
    if (text) turn("assistant wrong", wrong);
    else { shown.textContent = wrong; box.classList.add("wrong"); }
  }
  box.removeAttribute("aria-busy");
  asking = null;
  at("send").textContent = words.send;
  return Boolean(text || finish) || signal.reason === CLEARED;
}

async function send() {
  if (asking) return asking.abort();
  const text = at("text").value.trim();
  if (!text && !media.length) return;
  const asked = { text, media };
  const parts = [...media.map(part), ...(text ? [{ type: "text", text }] : [])];
  conversation.push({ role: "user", content: media.length ? parts : text });
  turn("user", text, media);
  at("text").value = "";
  media = [];
  showMedia();
  fit();
  if (!(await answer())) { // a question without an answer is taken back, to be mended
    conversation.pop();
    if (!at("text").value && !media.length) { at("text").value = asked.text; media = asked.media; showMedia(); fit(); }
    at("log").scrollTop = at("log").scrollHeight; // why it has none, above the question that takes its room back
  }
  at("text").focus();
}

function fit() {
  at("text").style.height = "auto";
  at("text").style.height = `${at("text").scrollHeight + 2}px`;
}

async function models() {
  try {
    const reply = await fetch("v1/models");
    if (!reply.ok) throw new Error(await refusal(reply));
    for (const { id } of (await reply.json()).data) at("model").append(new Option(id, id));
  } catch (error) {
    turn("assistant wrong", error.message);
  }
}

at("form").onsubmit = (event) => { event.preventDefault(); send(); };
at("text").oninput = fit;
at("text").onkeydown = (event) => { // not while an input method composes: there Enter chooses a word
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); if (!asking) send(); }
};
at("files").onchange = () => { attach([...at("files").files]); at("files").value = ""; };
document.onpaste = (event) => { if (event.clipboardData.files.length) { event.preventDefault(); attach([...event.clipboardData.files]); } };
document.ondragover = (event) => { event.preventDefault(); document.body.classList.add("over"); };
document.ondragleave = (event) => { if (!event.relatedTarget) document.body.classList.remove("over"); };
document.ondrop = (event) => { event.preventDefault(); document.body.classList.remove("over"); attach([...event.dataTransfer.files]); };
document.onclick = (event) => { if (!at("settings").contains(event.target)) at("settings").open = false; };
at("clear").onclick = () => {
  if (asking) asking.abort(CLEARED);
  conversation.length = 0;
  media = [];
  showMedia();
  at("log").replaceChildren();
  at("text").focus();
};

translate();
models();

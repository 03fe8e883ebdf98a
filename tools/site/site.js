"use strict"
const up = document.currentScript.dataset.up, root = document.documentElement, $ = (s) => document.querySelector(s)

// Light or dark: the reader's choice is kept, else the system's counts.
$("#theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches
  root.dataset.theme = dark ? "light" : "dark"
  try { localStorage.setItem("theme", root.dataset.theme) } catch (e) {}
})

// The list of pages on a small screen.
const showPages = (on) => {
  document.body.classList.toggle("pages-open", on)
  $("#menu").setAttribute("aria-expanded", on)
}
$("#menu").addEventListener("click", () => showPages(!document.body.classList.contains("pages-open")))
document.addEventListener("keydown", (e) => { if (e.key === "Escape") { showPages(false); hits.hidden = true } })
const current = $("#pages [aria-current]")
if (current) $("#pages").scrollTop = current.offsetTop - $("#pages").clientHeight / 2

// Which section is being read.
const places = new Map([...document.querySelectorAll("#toc a")].map((a) => [decodeURIComponent(a.hash.slice(1)), a]))
const heads = [...document.querySelectorAll("main h2[id], main h3[id]")].filter((h) => places.has(h.id))
const mark = () => {
  let here = null
  for (const h of heads) if (h.getBoundingClientRect().top < 130) here = h
  for (const [id, a] of places) a.classList.toggle("here", here !== null && id === here.id)
  const a = here && places.get(here.id)
  if (a) a.scrollIntoView({ block: "nearest" })
}
if (heads.length) { addEventListener("scroll", mark, { passive: true }); mark() }

// A link on each heading, a copy button on each block of code.
for (const h of document.querySelectorAll("main h2[id], main h3[id]")) {
  const a = document.createElement("a")
  a.href = "#" + h.id; a.className = "anchor"; a.textContent = "#"; a.setAttribute("aria-label", "Link to this place")
  h.append(a)
}
for (const block of document.querySelectorAll("div.sourceCode")) {
  const button = document.createElement("button")
  button.className = "copy"; button.textContent = "Copy"
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(block.querySelector("code").textContent)
    button.textContent = "Copied"; setTimeout(() => { button.textContent = "Copy" }, 1200)
  })
  block.append(button)
}

// Search: every word must occur; words in headings count most.
const box = $("#search input"), hits = $("#search ol")
let loading
const load = () => loading ||= new Promise((done) => {
  const script = document.createElement("script")
  script.src = up + "site/search.js"; script.onload = done; document.head.append(script)
})
const escape = (s) => s.replace(/[&<>]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" }[c]))
const find = async () => {
  await load()
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean)
  const scored = []
  for (const [href, page, head, text] of words.length ? window.ftkitSearch : []) {
    const [p, h, t] = [page, head, text].map((s) => s.toLowerCase())
    if (!words.every((w) => p.includes(w) || h.includes(w) || t.includes(w))) continue
    const score = words.reduce((s, w) => s + 8 * (h === w) + 4 * h.includes(w) + 2 * p.includes(w) + t.includes(w), 0)
    const at = Math.max(0, t.indexOf(words[0]) - 40)
    scored.push([score, href, page, head, text.slice(at, at + 110)])
  }
  scored.sort((a, b) => b[0] - a[0])
  hits.innerHTML = scored.slice(0, 12).map(([, href, page, head, text]) => `<li><a href="${up}${href}">
    <b>${escape(head || page)}</b> <i>${escape(page)}</i><small>${escape(text)}</small></a></li>`).join("")
    || (words.length ? "<li><p>Nothing found</p></li>" : "")
  hits.hidden = !words.length
}
box.addEventListener("input", find)
box.addEventListener("focus", load)
$("#search").addEventListener("submit", (e) => { e.preventDefault(); const a = hits.querySelector("a"); if (a) location = a.href })
document.addEventListener("click", (e) => { if (!$("#search").contains(e.target)) hits.hidden = true })
document.addEventListener("keydown", (e) => {
  if (e.key === "/" && !/input|textarea/i.test(e.target.tagName)) { e.preventDefault(); box.focus() }
})

"use strict"
let looked = Date.now()
async function look() {
  const old = document.querySelector("main")
  if (document.hidden || Date.now() - looked < 1000 * old.dataset.every) return
  looked = Date.now()
  try {
    const reply = await fetch(location.pathname, { cache: "no-store" })
    if (!reply.ok) throw new Error(reply.status)
    const fresh = new DOMParser().parseFromString(await reply.text(), "text/html").querySelector("main")
    if (fresh.innerHTML !== old.innerHTML) old.replaceWith(fresh)
    document.body.classList.remove("silent")
  } catch { document.body.classList.add("silent") }
}
setInterval(look, 500)

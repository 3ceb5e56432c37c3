// What the pages share: the API that they talk to, and nothing else.

export const $ = (id) => document.getElementById(id);
export const NEUTRAL = { gamma: 1, beta: 0 }; // the values that do nothing

export async function call(path, options) {
  let reply;
  try {
    reply = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer. Is it still running?");
  }
  const body = await reply.json().catch(() => ({}));
  if (!reply.ok) throw Object.assign(new Error(body.error || `error ${reply.status}`), body);
  return body;
}

export const post = (path, body) =>
  call(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

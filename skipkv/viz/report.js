// A frame tells where its slider stands (the compaction's step); the other frames follow.
addEventListener("message", (event) => {
  const frames = [...document.querySelectorAll("iframe")].map((frame) => frame.contentWindow);
  if (!frames.includes(event.source) || !event.data || !Number.isInteger(event.data.skipkvStep)) return;
  for (const frame of frames) if (frame !== event.source) frame.postMessage({ skipkvStep: event.data.skipkvStep }, "*");
});

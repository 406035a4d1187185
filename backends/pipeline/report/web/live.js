// A page that is served is loaded again when the run has gone on; the slider stays where it was.
{
  const chosen = sessionStorage.getItem("length");
  if (slider && chosen !== null && chosen <= slider.max) {
    slider.value = chosen;
    slider.dispatchEvent(new Event("input"));
  }
  slider?.addEventListener("input", () => sessionStorage.setItem("length", slider.value));
  const state = document.getElementById("live");
  const look = async () => {
    const answer = await fetch("version").catch(() => null);
    const version = answer?.ok ? await answer.text() : null;
    state.textContent = version ? "live: the page follows the run" : "edm2 report --serve does not answer any more";
    if (version && version !== state.dataset.version) location.reload();
    else setTimeout(look, 2000);
  };
  look();
}

"use strict";
// Shows the responses that the form asks for. Texts of the run are only compared, never run.
const form = document.getElementById("filters");
if (form) {
  const samples = [...document.querySelectorAll("#samples > details")];
  const kind = (score) => (score >= 1 ? "full" : score > 0 ? "part" : "none");
  const choose = () => {
    const wanted = Object.fromEntries(new FormData(form));
    let count = 0;
    for (const sample of samples) {
      const { run, domain, step, score } = sample.dataset;
      sample.hidden =
        (wanted.run && wanted.run !== run) ||
        (wanted.domain && wanted.domain !== domain) ||
        (wanted.score && wanted.score !== kind(Number(score))) ||
        (wanted.first && Number(step) < Number(wanted.first)) ||
        (wanted.last && Number(step) > Number(wanted.last));
      count += sample.hidden ? 0 : 1;
    }
    document.getElementById("shown").textContent = `${count} of ${samples.length} shown`;
  };
  form.addEventListener("input", choose);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(choose));
  form.hidden = false;
  choose();
}

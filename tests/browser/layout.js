// What is wrong with how a page lies in its window: one line each. Details are opened first.
(() => {
  const findings = [];
  const name = (element) => {
    const text = (element.textContent || element.src || "").trim().slice(0, 40);
    return `<${element.tagName.toLowerCase()}> "${text}"`;
  };
  document.querySelectorAll("details").forEach((element) => (element.open = true));

  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width) {
    findings.push(`the page is ${document.documentElement.scrollWidth} px wide, not ${width}`);
  }
  for (const element of document.body.querySelectorAll("*:not(svg *)")) {
    const box = element.getBoundingClientRect();
    const style = getComputedStyle(element);
    if (style.display !== "inline" && style.overflowX !== "visible"
        && element.scrollWidth > element.clientWidth) {
      findings.push(`cut or scrolled: ${name(element)}`);
    } else if (box.right > width + 1 || box.left < -1) {
      findings.push(`outside the window: ${name(element)}`);
    }
  }
  for (const image of document.images) {
    if (!(image.complete && image.naturalWidth && image.naturalHeight)) {
      findings.push(`no picture: ${name(image)}`);
    }
  }
  for (const svg of document.querySelectorAll("svg")) {
    const box = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")];
    if (!(box.width > 0 && box.height > 0 && svg.querySelector("path") && texts.length)) {
      findings.push(`nothing drawn: ${name(svg)}`);
      continue;
    }
    const scale = svg.viewBox.baseVal.width ? box.width / svg.viewBox.baseVal.width : 1;
    for (const text of texts) {
      const inner = text.getBoundingClientRect();
      if (inner.left < box.left - 1 || inner.right > box.right + 1
          || inner.top < box.top - 1 || inner.bottom > box.bottom + 1) {
        findings.push(`text leaves its picture: ${name(text)}`);
      }
      if (parseFloat(getComputedStyle(text).fontSize) * scale < 10) {
        findings.push(`text under 10 px: ${name(text)}`);
      }
    }
  }
  for (const link of document.querySelectorAll("a[href^='#']")) {
    if (!document.getElementById(link.getAttribute("href").slice(1))) {
      findings.push(`leads nowhere: ${name(link)}`);
    }
  }
  return findings;
})()

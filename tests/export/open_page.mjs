/** Use the live page in Chromium: node open_page.mjs NODE_MODULES CHROMIUM URL < steps; what it shows is JSON on the output. */

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { resolve } from "node:path";

const [modules, executablePath, url] = process.argv.slice(2);
const puppeteer = createRequire(resolve(modules, "_"))("puppeteer-core");
const browser = await puppeteer.launch({ executablePath, args: ["--no-sandbox", "--disable-dev-shm-usage"] });
try {
  const page = await browser.newPage();
  const problems = [];
  page.on("pageerror", (error) => problems.push(String(error)));
  await page.setRequestInterception(true); // themes ask for fonts elsewhere; nothing here depends on the network
  const local = [new URL(url).origin, "data:", "blob:"];
  page.on("request", (request) =>
    local.some((start) => request.url().startsWith(start)) ? request.continue() : request.abort());
  await page.goto(url, { waitUntil: "domcontentloaded" });
  await page.waitForFunction(
    () => document.querySelector('#live[aria-busy="false"]') || /make live|cannot/.test(document.querySelector("#status").textContent),
    { timeout: 120_000 },
  );
  const shown = [];
  for (const { picture, slider, value, key, draw, file } of JSON.parse(readFileSync(0, "utf8"))) {
    if (picture !== undefined) await page.click(`#pictures button:nth-child(${picture + 1})`);
    if (key) await page.focus(`#${slider}`).then(() => page.keyboard.press(key));
    else if (slider) {
      await page.$eval(`#${slider}`, (element, to) => {
        element.value = to;
        element.dispatchEvent(new Event("input"));
      }, value);
    }
    if (file) {
      await (await page.$("#file")).uploadFile(file);
      await page.waitForFunction(() => !document.querySelector('#pictures [aria-pressed="true"]'));
    }
    if (draw) {
      const box = await (await page.$("#pad")).boundingBox();
      for (const [i, [x, y]] of draw.entries()) {
        await page.mouse.move(box.x + x * box.width, box.y + y * box.height, { steps: 5 });
        if (i === 0) await page.mouse.down();
      }
      await page.mouse.up();
    }
    await page.waitForSelector('#live[aria-busy="false"]', { timeout: 120_000 });
    shown.push(await page.evaluate(() => ({
      exit: Number(document.getElementById("answer").dataset.exit),
      exits: [...document.querySelectorAll("#pictures span")].map((span) => Number(span.textContent)),
      thresholds: [...document.querySelectorAll("#thresholds input")].map((slider) => Number(slider.value)),
      answer: document.getElementById("answer").textContent,
      cost: document.getElementById("cost").textContent,
    })));
  }
  const status = await page.$eval("#status", (element) => element.textContent);
  if (process.env.SCREENSHOT) await page.screenshot({ path: process.env.SCREENSHOT, fullPage: true });
  process.stdout.write(JSON.stringify({ status, shown, problems, browser: await browser.version() }));
} finally {
  await browser.close();
}

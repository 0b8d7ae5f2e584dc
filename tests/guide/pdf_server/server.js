// GET /api/render?url=URL answers with the page as PDF.
const express = require('express');
const puppeteer = require('puppeteer-core');

const app = express();
app.get('/api/render', async (request, response) => {
  let browser;
  try {
    // However busy the machine is.
    browser = await puppeteer.launch({
      timeout: 0,
      executablePath: '/usr/bin/chromium',
      args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--disable-dev-shm-usage',
        '--disable-background-networking', '--disable-component-update', '--disable-sync', '--no-first-run'],
    });
    const page = await browser.newPage();
    await page.goto(request.query.url, { waitUntil: 'load', timeout: 0 });
    response.type('application/pdf').send(Buffer.from(await page.pdf({ timeout: 0 })));
  } catch (error) {
    response.status(500).send(String(error));
  } finally {
    if (browser) await browser.close();
  }
});
app.listen(process.env.PORT, '127.0.0.1');

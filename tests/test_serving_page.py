"""The page in a headless Chromium: a price before, an answer as it grows, the ledger after."""

import browser
import pytest
from endpoints import listening, opened, predicted, service
from hf_models import with_template

pytestmark = pytest.mark.skipif(browser.found() is None, reason="there is no Chromium on this machine")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    model = with_template(tmp_path_factory.mktemp("paged"))
    opening = opened(model, engine="wire", progress=False)
    with (
        service(opening, predict=predicted, engine="wire") as made,
        listening(made) as (host, port),
    ):
        yield f"http://{host}:{port}/"


def say(page, text):
    page.value(f"at('text').value = {text!r}; at('text').dispatchEvent(new Event('input')); 1")


def test_a_conversation_on_the_page(address, tmp_path):
    with browser.Browser(tmp_path / "profile") as page:
        page.go(address)
        page.until("at('state').textContent === 'Available' && at('model').textContent.startsWith('tiny')")
        assert page.value("at('send').disabled")
        page.value("at('most').value = 6; 1")
        say(page, "The passkey is 4711. <b>What is it?</b>")
        page.until("at('price').textContent.includes('rounds')")
        price = page.value("at('price').textContent")
        assert "sent a party" in price and "of the dealer's" in price and "not yet measured" in price
        page.value("at('send').click()")
        page.until("document.querySelectorAll('details').length === 1 && running === null")
        assert page.value("document.querySelectorAll('.user b').length") == 0  # text, and never markup
        assert page.value("document.querySelector('.answer > p:not(.progress)').textContent.length") > 0
        rows = page.value("document.querySelector('details').innerText + document.querySelector('table').textContent")
        assert "logits of each generated token" in rows and "client" in rows
        say(page, "Again.")
        page.until("at('price').textContent.includes('rounds')")
        page.value("document.querySelector('details').open = true; at('send').click()")
        page.until("document.querySelectorAll('details').length === 2 && running === null")
        assert page.value("said.length") == 4
        page.picture(tmp_path / "page.png")
        assert page.complaints() == []
        assert all(url.startswith(address) for url in page.asked() if url != "about:blank")


def test_an_answer_that_is_stopped(address, tmp_path):
    with browser.Browser(tmp_path / "profile") as page:
        page.go(address)
        page.until("at('state').textContent === 'Available' && model !== null")
        page.value("at('most').value = 300; 1")
        say(page, "The passkey is 4711.")
        page.value("at('send').click()")
        page.until("!at('stop').hidden")
        page.value("at('stop').click()")
        page.until("document.querySelector('.answer').textContent.includes('stopped') && running === null")
        page.until("fetch('/health').then(a => a.json()).then(h => h.running === 0)")
        assert page.complaints() == []

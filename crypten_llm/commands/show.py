"""Showing a run to the person at the terminal: progress, the answer as it grows, the cost table.

Owns what is printed during ``generate`` and ``bench``. stdout gets the answer and the JSON; stderr the rest.
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from crypten_llm.errors import CryptenLLMError, shown
from crypten_llm.models.tokenizer import has_chat_template
from crypten_llm.session.admission import WARNING
from crypten_llm.session.api import PrivateLlama, check_policy
from crypten_llm.session.bench import Shape
from crypten_llm.session.defaults import FILE
from crypten_llm.session.prompted import Progress, Step
from crypten_llm.session.receipt import Receipts
from crypten_llm.session.report import cost_table, revealed_table
from crypten_llm.session.request import Asked, Request, Result
from crypten_llm.session.settings import ProtocolConfig, split
from crypten_llm.units import size

if TYPE_CHECKING:  # of commands that bring engine wire along
    from crypten_llm.commands.cost import Prediction
    from crypten_llm.commands.debug_compare import Comparison


def say(text: str = "") -> None:
    print(shown(text), file=sys.stderr, flush=True)


def answer(text: str) -> None:
    """A piece of an answer. The owner's model says what is in it, so on a terminal it is text alone."""
    print(shown(text) if sys.stdout.isatty() else text, end="", flush=True)


def show_generation(
    request: Request, model: str, tokenizer: str | None, as_json: bool, receipt: str | None = None, **settings: Any
) -> Result:
    """Loads, streams the answer, prints what it cost and what it revealed; settings as for ``from_pretrained``.

    receipt: a file for what all parties sign of it.
    """
    protocol, launched = split(settings)
    say(who(protocol))
    with PrivateLlama.from_pretrained(model, tokenizer=tokenizer, first=request, **settings) as llama:
        say(f"model shared in {llama.load_seconds:.1f} s")
        say_outside(llama)
        if request.prompt is not None and not request.chat and has_chat_template(llama.tokenizer):
            say("the tokenizer has a chat template, which is not applied to the prompt; --chat applies it")
        asked = llama.prepare(request)
        say_decoding(llama, asked)
        _stream(llama, asked, launched.progress, show_text=not as_json)
        (result,) = llama.result
    say()
    if protocol.is_private:
        say(cost_table(result.cost))
        peaks = zip(protocol.roles, result.cost.peak_bytes(), strict=True)
        say("peak memory: " + ", ".join(f"{name} {size(peak)}" for name, peak in peaks))
        say()
    say(revealed_table(result.revealed))
    say_outside(llama)
    if receipt is not None and result.receipt is not None:
        Receipts((result.receipt,)).write(receipt)
    if as_json:
        print(json.dumps(result.to_dict()), flush=True)
    return result


def say_outside(llama: PrivateLlama) -> None:
    """Why no answer is to be trusted, where the owner has shared its model although the engine would be wrong."""
    if llama.party.outside:
        say(f"{WARNING}not to be trusted: {llama.party.outside}")


def mark(llama: PrivateLlama) -> str:
    """What stands before an answer that is not to be trusted, wherever stdout goes."""
    return "[not to be trusted] " if llama.party.outside else ""


def say_decoding(llama: PrivateLlama, asked: Asked) -> None:
    """How tokens will be chosen and what ends the answer, and who says so."""
    request, defaults = asked.request, llama.defaults
    source = defaults.stop_source if request.eos_token_id is None else "as asked for"
    until = f"until token {', '.join(map(str, asked.stop_ids))} ({source})"
    if not asked.stop_ids:
        until = "and no token ends it: --eos-token-id says which would"
    stops = f" or one of {len(request.stops)} stop texts" if request.stops else ""
    used = [name for name in defaults.sampling if getattr(request, name) is None and name != "do_sample"]
    source = f" ({FILE})" if used and (asked.sampling.do_sample or "repetition_penalty" in used) else ""
    say(f"decoding: {asked.sampling}{source}, at most {asked.plan.max_new_tokens} tokens, {until}{stops}")
    if asked.plan.hide_length:
        say(f"all {asked.plan.max_new_tokens} steps are run, so that only the client learns the answer's length")
    if defaults.not_followed:
        say(f"{FILE} asks for {', '.join(defaults.not_followed)}, which is not followed here")


def who(protocol: ProtocolConfig) -> str:
    if not protocol.is_private:
        return "engine plain: one process sees everything, nothing is private"
    names = protocol.roles
    taped = " and a tape" if protocol.tape else ""
    return (
        f"engine {protocol.engine}: {len(names)} processes ({', '.join(names)}){taped}; semi-honest, dealer does not "
        "collude"
    )


@contextmanager
def closed(events: Any) -> Any:
    """Closed here, whatever ends its reading. Ctrl-C ends the other parties too, and is what is reported then."""
    try:
        yield events
    except KeyboardInterrupt:
        with suppress(CryptenLLMError):
            events.close()
        raise
    finally:
        events.close()


def _stream(llama: PrivateLlama, asked: Asked, progress: bool, show_text: bool) -> None:
    as_text = llama.has_tokenizer
    bar = tqdm(desc="prefill", unit="token", total=1, disable=not progress, leave=False)
    with closed(llama.stream([asked.request])) as events:
        for event in events:
            match event:
                case Progress(done, total):
                    bar.total = total
                    bar.update(done - bar.n)
                case Step():
                    if event.index == 0:
                        bar.close()
                        say(f"prefill in {event.seconds:.1f} s")
                        hidden, total = not progress or show_text, asked.plan.max_new_tokens
                        bar = tqdm(desc="decode", unit="token", total=total, disable=hidden, leave=False)
                    bar.update()
                    if show_text:
                        before = mark(llama) if event.index == 0 else ""
                        answer(before + (event.text if as_text else f"{event.token_id} "))
    bar.close()
    if show_text:
        print(flush=True)
    (result,) = llama.result
    pace = result.seconds["per_token"]
    say(
        (f"{result.public_tokens} public and " if result.public_tokens else "")
        + f"{result.prompt_tokens} prompt tokens, {len(result.token_ids)} new ({result.finish_reason})"
        + (f", {pace:.2f} s a token" if pace else "")
    )


def show_bench(shape: Shape, as_json: bool, **settings: Any) -> None:
    """Times ``shape`` and prints the figures; settings as for ``from_pretrained``."""
    protocol, launched = split(settings)
    shape.config()  # refuses impossible sizes before any process starts
    check_policy(shape.policy)
    with PrivateLlama(protocol, launched) as llama:
        figures, cost = llama.bench(shape)
    by_rank = [sent // shape.steps for sent in cost.bytes_sent()]
    result = {
        "engine": protocol.engine,
        **vars(shape),
        **figures,
        "rounds_per_step": cost.rounds() // shape.steps,
        "dealer_rounds_per_step": cost.dealer_rounds() // shape.steps,
        "bytes_sent_per_step": max(by_rank),
        "bytes_sent_per_step_by_rank": by_rank,
        "offline_bytes_per_step": cost.dealer_bytes() // shape.steps,
        "peak_memory_bytes": cost.peak_bytes(),
    }
    if protocol.is_private:
        say(cost_table(cost))
    say(
        f"{result['seconds_per_step']:.3f} s a step, {result['rounds_per_step']} rounds, "
        f"{size(result['bytes_sent_per_step'])} sent a party, {size(result['offline_bytes_per_step'])} with the "
        f"dealer, error {result['max_abs_err']:.2g}"
    )
    if as_json:
        print(json.dumps(result), flush=True)


def show_cost(prediction: Prediction, as_json: bool) -> None:
    """Prints what a request will cost."""
    say(cost_table(prediction.cost))
    steps = {"prefill": prediction.phase("prefill")}
    if prediction.decode_steps:
        steps["a token"] = prediction.phase("decode", prediction.decode_steps)
    for name, figures in steps.items():
        say(
            f"{name}: {figures['rounds']:,} rounds, {size(max(figures['bytes_sent']))} sent a party, "
            f"{size(figures['dealer_bytes'])} with the dealer, {_seconds(prediction, name, figures)}"
        )
    roles = (f"{role} {size(held['weights'])} and {size(held['cache'])}" for role, held in prediction.memory.items())
    say(f"memory of weights and of the cache: {', '.join(roles)}")
    where = f"for {prediction.machine.name} and material at hand"
    say(f"rounds and bytes are counted and exact; seconds are estimated, {where}")
    if as_json:
        print(json.dumps(prediction.to_dict()), flush=True)


def _seconds(prediction: Prediction, name: str, figures: dict) -> str:
    """Of a step: on a card the dealer, which works along with a prefill, waits for each token of a streamed answer."""
    found = f"about {figures['seconds']:.3g} s"
    if not prediction.machine.dealer_waits:
        return f"{found} ({figures['dealer_seconds']:.3g} s to deal)"
    streamed = figures["seconds"] + figures["dealer_seconds"]
    return found if name == "prefill" else f"{found}, {streamed:.3g} s streamed"


def show_audit(audit: dict[str, dict]) -> None:
    """Prints how many masks an audited run drew, of which none served twice."""
    for role, seen in audit.items():
        counts = f"{seen['masks']:,} masks of {seen['words']:,} words, {size(seen['stream_bytes'])} of streams"
        say(f"audit, {role}: {counts}, {seen['messages']:,} messages of openings; no mask was used twice")
    say()


def show_comparison(comparison: Comparison, as_json: bool, audit: dict | None = None) -> None:
    """Prints every operation's largest error beside its bound, and the first that left it; ``audit`` joins the JSON."""
    say(f"{'where':<36}{'operation':<18}{'max abs error':>14}{'bound':>10}{'used':>9}")
    for found in comparison.worst():
        mark = "" if found.holds else f"  <-- {found.outside or 'beyond its bound'}"
        say(f"{found.where:<36}{found.operation:<18}{found.error:>14.2g}{found.bound:>10.2g}{found.used:>9.1%}{mark}")
    say()
    agreeing = f"{sum(comparison.equal_tokens)} of {len(comparison.equal_tokens)} best tokens agree"
    say(f"logits: largest error {max(comparison.logit_errors):.2g}, {agreeing}")
    say(comparison.describe_first())
    say(revealed_table(comparison.shown))
    if as_json:
        print(json.dumps({**comparison.to_dict(), **({"audit": audit} if audit else {})}), flush=True)

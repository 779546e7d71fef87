"""`nebula sample`: let a trained model write text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nebula.cli import output
from nebula.cli.ckpt import TrainedModel, load_model
from nebula.errors import UsageError

TOP_K = 40


def command(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder, or a file that `nebula ckpt export` wrote.")],
    prompt: Annotated[str | None, typer.Option(help="How the text starts. Default: the recipe's prompt.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to write, at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.01, help="Low is predictable, 1 is as the model learned.")] = 0.8,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same text.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print a prompt and what the model makes of it."""
    model = load_model(checkpoint)
    start = model.agreement.run.prompt if prompt is None else prompt
    text = start + continuation(model, start, tokens=tokens, temperature=temperature, seed=seed)
    again = f"nebula sample {checkpoint} --seed {seed + 1}"
    output.result("sample", {"prompt": start, "text": text, "seed": seed}, text=text, next=again, as_json=json)


def continuation(model: TrainedModel, prompt: str, *, tokens: int, temperature: float, seed: int) -> str:
    """Only what follows the prompt, up to the end of the document. Raises UsageError for an empty prompt."""
    import torch
    from tokenizers import Tokenizer

    from nebula.data.tokenizer import END
    from nebula.models.generate import generate
    from nebula.models.transformer import Transformer

    tokenizer = Tokenizer.from_str(model.tokenizer)
    ids = tokenizer.encode(prompt).ids
    if not ids:
        raise UsageError("the prompt is empty", hint="give at least one character, such as --prompt 'def '")
    with torch.device("meta"):
        transformer = Transformer(model.agreement.run.model)
    transformer.load_state_dict(dict(model.tensors), assign=True)
    written = generate(
        transformer.eval(),
        ids,
        steps=tokens,
        context=model.agreement.run.data.seq_len,
        temperature=temperature,
        top_k=TOP_K,
        seed=seed,
        stop=tokenizer.token_to_id(END),
    )
    return str(tokenizer.decode(written))

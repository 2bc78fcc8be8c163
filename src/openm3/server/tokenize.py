"""Text to token ids and back over HTTP, in vLLM's shapes: harnesses and load generators count with it."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from openm3.server.calls import Call
from openm3.server.errors import RequestError
from openm3.server.media.parts import with_media
from openm3.server.parts import Documents, with_documents
from openm3.server.service import Service


class TokenizeRequest(BaseModel):
    """A text or a conversation. The model's tokenizer adds no tokens of its own to a text."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [{"required": ["prompt"]}, {"required": ["messages"]}]})

    model: str | None = None
    prompt: str | None = Field(None, description="A text; what reads like a control token becomes one.")
    messages: list[dict[str, Any]] | None = Field(None, description="Or a conversation, read as a chat's prompt.")
    documents: Documents = None
    tools: list[dict[str, Any]] | None = None
    thinking: Literal["enabled", "disabled", "adaptive"] = "adaptive"
    return_token_strs: bool | None = Field(None, description="Whether to say each token's text, too.")


class DetokenizeRequest(BaseModel):
    """Token ids."""

    model: str | None = None
    tokens: list[int]


class Tokens(BaseModel):
    """Token ids, how many they are, and how many the model takes."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(BaseModel):
    """What token ids say."""

    prompt: str


class TokenizerInfo(BaseModel):
    """The named control tokens, the chat template, and how many tokens the model takes."""

    tokenizer_class: str
    bos_token: str
    eos_token: str
    pad_token: None
    model_max_length: int
    chat_template: str


def routes(service: Service) -> APIRouter:
    """/tokenize, /detokenize and /tokenizer_info."""
    router = APIRouter(tags=["tokenizer"])
    tokenizer = service.tokenizer

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Tokens:
        """The token ids of a text or a conversation."""
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("give either prompt or messages", param="prompt")
        if body.documents and body.messages is None:
            raise RequestError("documents need messages to stand in", param="documents")
        service.check_open()
        if body.messages is not None:
            messages = with_documents(with_media(body.messages), body.documents)
            call = Call(messages=messages, tools=body.tools or (), thinking=body.thinking)
            ids = list((await service.prompt(call)).ids)
        else:
            ids = await asyncio.to_thread(tokenizer.encode, body.prompt or "", special=True)
        texts = [tokenizer.decode([i]) for i in ids] if body.return_token_strs else None
        return Tokens(count=len(ids), max_model_len=service.max_model_len, tokens=ids, token_strs=texts)

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Text:
        """The text of token ids."""
        service.check_model(body.model)
        bad = next((i for i in body.tokens if not 0 <= i < service.vocab_size), None)
        if bad is not None:
            raise RequestError(f"token id {bad} is outside the vocabulary of {service.vocab_size}", param="tokens")
        return Text(prompt=await asyncio.to_thread(tokenizer.decode, body.tokens))

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> TokenizerInfo:
        """What a client needs to write prompts by itself: the named control tokens and the chat template."""
        return TokenizerInfo(
            tokenizer_class="PreTrainedTokenizerFast",
            bos_token=tokenizer.decode([tokenizer.bos_id]),
            eos_token=tokenizer.decode([tokenizer.eos_id]),
            pad_token=None,
            model_max_length=service.max_model_len,
            chat_template=tokenizer.chat_template,
        )

    return router

"""The OpenAPI document of the service."""

from typing import Any

from captioner import __version__
from captioner.service.limits import Limits
from captioner.service.requests import LONGEST_TEXT, NUMBERS, TEXTS

_JSON = "application/json"
_LOGPROB = {"type": "number", "description": "natural logarithm of a probability"}
_HEAT = "7×7 or 14×14 bytes row by row, over the inner 224×224 of the picture squashed to 256×256; 255 is the hottest"
_PROBABILITY = {"type": "number", "minimum": 0, "maximum": 1}


def document(limits: Limits, needs_token: bool) -> dict[str, Any]:
    """What may be sent and what comes back, for people and for programs that generate clients."""
    picture = {"type": "string", "format": "binary", "minLength": 1}
    form = {
        "type": "object",
        "properties": {"picture": {"type": "array", "items": picture, "minItems": 1, "maxItems": limits.pictures}},
        "required": ["picture"],
        "additionalProperties": False,
    }
    post = {
        "operationId": "caption",
        "summary": "Caption one picture or several",
        "description": "The body is a picture, or a form with pictures as files. Nothing is kept. Pictures that cannot "
        "be read are named with the reason; only if none can be read, the status is 422.",
        "parameters": [_parameter(name) for name in (*NUMBERS, *TEXTS)],
        "requestBody": {
            "required": True,
            "content": {
                "image/*": {"schema": picture},
                "application/octet-stream": {"schema": picture},
                "multipart/form-data": {"schema": form},
            },
        },
        "responses": {
            "200": {
                "description": "One result per picture, in order",
                "content": {_JSON: {"schema": {"$ref": "#/components/schemas/Results"}}},
            },
            **{str(status): _refusal(description) for status, description in REFUSALS.items()},
        },
    }
    if needs_token:
        post["security"] = [{"token": []}]
    components: dict[str, Any] = {"schemas": _schemas()}
    if needs_token:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "caption-serve", "version": __version__, "license": {"name": "BSD-3-Clause"}},
        "paths": {
            "/v1/captions": {"post": post},
            "/healthz": {"get": _get("Whether the process answers", "health", {"200": "It does"})},
            "/readyz": {
                "get": _get("Whether it takes pictures", "readiness", {"200": "It does", "503": "The queue is full"})
            },
        },
        "components": components,
    }


REFUSALS = {
    400: "A parameter or the form is wrong, the model does not know a word, or there is no picture",
    401: "The bearer token is missing or wrong",
    408: "The body did not arrive in time",
    413: "The body is too large",
    415: "The media type is not that of a picture or a form",
    422: "None of the pictures can be read",
    429: "The service is busy; Retry-After says for how many seconds",
    503: "The captions were not ready in time",
}


def _parameter(name: str) -> dict[str, Any]:
    descriptions = {
        "beam_size": "beams of the search; 1 is greedy. Without it, as the service was started, or as suits the model",
        "n_best": "captions per picture, best first",
        "max_words": "greatest number of words of a caption",
        "explain": "1: with a heat-map per word of where the model looked",
        "require": "what the caption says: words or phrases, equally good forms side by side, as in dog/dogs,beach",
        "ban": "what it does not say, each form of it, as in man,men",
        "caption_prefix": "what it begins with",
    }
    schema: dict[str, Any] = {"type": "string", "maxLength": LONGEST_TEXT}
    if name in NUMBERS:
        least, greatest = NUMBERS[name]
        schema = {"type": "integer", "minimum": least, "maximum": greatest}
    return {"name": name, "in": "query", "description": descriptions[name], "schema": schema}


def _get(summary: str, operation: str, answers: dict[str, str]) -> dict[str, Any]:
    schema = {"type": "object", "properties": {"status": {"type": "string"}}, "required": ["status"]}
    content = {_JSON: {"schema": schema}}
    responses = {status: {"description": text, "content": content} for status, text in answers.items()}
    return {"operationId": operation, "summary": summary, "responses": responses}


def _refusal(description: str) -> dict[str, Any]:
    return {"description": description, "content": {_JSON: {"schema": {"$ref": "#/components/schemas/Refusal"}}}}


def _schemas() -> dict[str, Any]:
    word = {
        "type": "object",
        "properties": {
            "word": {"type": "string"},
            "logprob": _LOGPROB,
            "heat": {"type": "string", "contentEncoding": "base64", "description": _HEAT},
        },
        "required": ["word", "logprob"],
    }
    caption = {
        "caption": {"type": "string"},
        "logprob": {**_LOGPROB, "description": "log p(caption | picture), summed over its words and END"},
        "confidence": {**_PROBABILITY, "description": "geometric mean of the words' probabilities"},
        "words": {"type": "array", "items": word},
    }
    name = {"type": "string", "description": "the client's own name of the file, without folders"}
    described = {"type": "object", "properties": caption, "required": list(caption)}
    n_best = {"type": "array", "items": described, "description": "if more than one was asked for, best first"}
    arithmetic = {"type": "string", "description": "what it was computed with, such as fp32 or bf16"}
    result = {
        "type": "object",
        "properties": {"file_name": name, **caption, "n_best": n_best, "arithmetic": arithmetic},
        "required": ["file_name", *caption],
    }
    failed = {
        "type": "object",
        "properties": {"file_name": name, "error": {"type": "string", "description": "why there is no caption"}},
        "required": ["file_name", "error"],
    }
    results = {"type": "array", "items": {"anyOf": [result, failed]}}
    refusal = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}
    return {
        "Results": {"type": "object", "properties": {"results": results}, "required": ["results"]},
        "Refusal": refusal,
    }

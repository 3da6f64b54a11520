"""OpenAI's wire format: `POST /v1/images/edits` and `GET /v1/models/{model}`.

body ──bodies──▶ parts in OpenAI's words ──orders──▶ EditOrder ──painting──▶ Painted ──answers──▶ Answer
"""

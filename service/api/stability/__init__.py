"""The wire format of Stability's REST API: `POST /v2beta/stable-image/edit/inpaint`."""

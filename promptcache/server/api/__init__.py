"""The forms of four APIs: a request's body to a `Completion`, its events to an answer.

Pure translation without an engine or HTTP: each module has the models of an API's
requests, `completion_of` and a class that encodes the answer, streamed or whole.
"""

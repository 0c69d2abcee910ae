"""Errors that only a call over HTTP can make; the rest of the tree is in `service.errors`."""

from __future__ import annotations

from service.errors import RequestError, ServiceError


class InvalidRequest(RequestError):
    """The request does not have the form that this call takes.

    `errors` names each field of the body by a JSON pointer, and each parameter by its name.
    """

    code = "invalid_request"


class MalformedBody(RequestError):
    """The body is not the JSON that it says it is."""

    code = "malformed_body"


class BodyTooLarge(RequestError):
    """The body is larger than this server takes."""

    code = "body_too_large"


class BodyTooSlow(RequestError):
    """The body stopped coming.

    What has come of an upload is kept: go on from `Upload-Offset`.
    """

    code = "body_too_slow"


class HeadTooSlow(RequestError):
    """The headers did not come in time."""

    code = "head_too_slow"


class HeadTooLarge(RequestError):
    """The address and the headers of the call are larger than this server takes."""

    code = "head_too_large"


class MalformedRequest(RequestError):
    """What came is not HTTP."""

    code = "malformed_request"


class HostNotAllowed(RequestError):
    """The call is for another host.

    Where no keys are asked for, the header `Host` has to name this machine: any page in a browser could otherwise call
    in the name of its own host. The operator allows other names with `ARROWQUANT_ALLOWED_HOSTS`.
    """

    code = "host_not_allowed"


class LengthRequired(RequestError):
    """The call has to say how long its body is.

    Send `Content-Length`, or the length as part of `Content-Range`.
    """

    code = "length_required"


class MethodNotAllowed(ServiceError):
    """This address does not take that method.

    The header `Allow` says which it takes.
    """

    code = "method_not_allowed"


class NotAcceptable(ServiceError):
    """No form of this answer is among those in `Accept`."""

    code = "not_acceptable"


class UnsupportedMediaType(ServiceError):
    """The body has a media type that this call does not take."""

    code = "unsupported_media_type"


class RangeNotSatisfiable(ServiceError):
    """The range lies outside the file.

    The header `Content-Range` says how long the file is.
    """

    code = "range_not_satisfiable"


class TooManyConnections(ServiceError):
    """The server has as many connections as it takes.

    Close those that are not needed, and try again after the time in `Retry-After`.
    """

    code = "too_many_connections"

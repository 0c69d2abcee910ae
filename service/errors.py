"""Everything that can go wrong, as one tree that knows no HTTP.

    ArrowQuantError
    ├── RequestError                  the request cannot be carried out as it stands
    │   ├── InvalidConfig             invalid_config
    │   ├── UnsupportedByFormat       unsupported_by_format
    │   ├── ForbiddenPath             path_forbidden
    │   ├── ModelNotFound             model_not_found
    │   ├── UnsupportedModel          unsupported_model
    │   │   ├── PickledWeights        pickled_weights
    │   │   └── AlreadyQuantized      already_quantized
    │   ├── StoreRefused              store_refused
    │   ├── TargetInUse               target_in_use
    │   ├── BlobNotFound              blob_not_found
    │   ├── BlobTooLarge              blob_too_large
    │   ├── DigestMismatch            digest_mismatch
    │   ├── StorageQuotaExceeded      storage_quota_exceeded
    │   ├── ExceedsMemory             exceeds_memory
    │   ├── WebhookRefused            webhook_refused
    │   ├── WebhookSecretMissing      webhook_secret_missing
    │   ├── InvalidCalibration        invalid_calibration
    │   └── InvalidTable              invalid_table
    ├── ModelError                    the model's files are not what they claim to be
    │   ├── CorruptModel              corrupt_model
    │   ├── UnknownDtype              unknown_dtype
    │   ├── NonFiniteWeights          non_finite_weights
    │   ├── ModelsDiffer              models_differ
    │   └── SourceChanged             source_changed
    ├── RunError                      the work could not be finished
    │   ├── AccuracyTooLow            accuracy_too_low
    │   ├── DiskFull                  disk_full
    │   ├── StorageFailure            storage_failure
    │   │   └── StoreUnavailable      store_unavailable
    │   ├── Cancelled                 job_cancelled
    │   ├── TimedOut                  job_timeout
    │   ├── PendingTimedOut           pending_timeout
    │   └── InternalError             internal_error
    └── ServiceError                  the service cannot take the call now, or not at all
        ├── Unauthorized              unauthorized
        ├── ForbiddenScope            forbidden_scope
        ├── RateLimited               rate_limited
        ├── TooManyOpenJobs           too_many_open_jobs
        ├── NotFound                  not_found
        ├── ArtifactsExpired          artifacts_expired
        ├── NotReady                  not_ready
        ├── NotFinished               job_not_finished
        ├── NotTerminal               job_not_terminal
        ├── JobInUse                  job_in_use
        ├── QueueFull                 queue_full
        ├── LookupsBusy               lookups_busy
        ├── Draining                  draining
        ├── UploadInProgress          upload_in_progress
        ├── UploadOffsetMismatch      upload_offset_mismatch
        ├── IdempotencyKeyReused      idempotency_key_reused
        ├── IdempotencyKeyInFlight    idempotency_key_in_flight
        └── IllegalTransition         illegal_transition

The first line of a docstring is the problem's title, the rest explains it to a user: both are
served at `/problems/<code>`. `detail` says what is wrong in this case, where, and what to do.
"""

from __future__ import annotations

from typing import ClassVar

#: Of what an error says: names from a model may be of any length, and errors are stored, sent and logged.
MAX_DETAIL = 2000
MAX_TENSOR_NAME = 500


class ArrowQuantError(Exception):
    """Something went wrong."""

    code: ClassVar[str] = "error"

    def __init__(self, detail: str, *, pointer: str | None = None, tensor: str | None = None) -> None:
        self.detail = _shortened(detail, MAX_DETAIL)
        super().__init__(self.detail)
        self.pointer = pointer
        self.tensor = None if tensor is None else _shortened(tensor, MAX_TENSOR_NAME)


def _shortened(text: str, limit: int) -> str:
    """The text, its middle left out where it is too long: errors end with what to do."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]} … {text[-limit // 3 :]}"


class RequestError(ArrowQuantError):
    """The request cannot be carried out as it stands."""

    code = "invalid_request"


class InvalidConfig(RequestError):
    """The configuration is not valid.

    Fields contradict each other, or a value is out of its range. `errors` names each field.
    """

    code = "invalid_config"


class UnsupportedByFormat(RequestError):
    """The output format cannot hold this scheme.

    Choose another output format, or a scheme that the format lists under `/v1/formats`.
    """

    code = "unsupported_by_format"


class ForbiddenPath(RequestError):
    """The path is outside the folders that this server may use.

    A `file://` address has to lie under one of the server's model roots, links resolved, and one in a store under a
    remote root. The operator adds roots with `arrowquant serve --model-root` and `--remote-root`.
    """

    code = "path_forbidden"


class ModelNotFound(RequestError):
    """There is no model at this address."""

    code = "model_not_found"


class UnsupportedModel(RequestError):
    """The model is stored in a way that this service does not read."""

    code = "unsupported_model"


class PickledWeights(UnsupportedModel):
    """The weights are pickled.

    Loading a pickle runs whatever code it holds, so this service never does. Convert the file
    where you trust it: `safetensors.torch.save_file(torch.load(path, weights_only=True), "model.safetensors")`.
    """

    code = "pickled_weights"


class AlreadyQuantized(UnsupportedModel):
    """The model is already quantized.

    Quantizing it again would add one error to another. Give the original weights.
    """

    code = "already_quantized"


class StoreRefused(RequestError):
    """The store does not let this server in.

    Buckets and gated models are read with the credentials of the server, which its operator sets: never with any of a
    request.
    """

    code = "store_refused"


class TargetInUse(RequestError):
    """The target is not free.

    Another job is writing to this folder, or it holds files already.
    """

    code = "target_in_use"


class BlobNotFound(RequestError):
    """A blob that the request names is not there.

    Send it first: `PUT /v1/blobs/sha256:<digest>`. A blob that is not used for a while expires.
    """

    code = "blob_not_found"


class BlobTooLarge(RequestError):
    """The blob is larger than this server takes."""

    code = "blob_too_large"


class DigestMismatch(RequestError):
    """The bytes are not those that the digest names.

    Nothing of the upload is kept. Compute the SHA-256 of the file again, and send it from the start.
    """

    code = "digest_mismatch"


class StorageQuotaExceeded(RequestError):
    """No more may be stored.

    It is the quota of your tenant: artifacts and blobs count, and uploads that are not complete. Purge jobs, or wait
    until blobs expire.
    """

    code = "storage_quota_exceeded"


class WebhookRefused(RequestError):
    """The webhook's address may not be called.

    It has to be `https://` to a host in the public internet, without a password; not a redirect, which is not followed.
    The operator can allow networks of their own with `ARROWQUANT_WEBHOOK_ALLOWED_NETWORKS`.
    """

    code = "webhook_refused"


class WebhookSecretMissing(RequestError):
    """There is no secret to sign webhooks with.

    Without a signature a receiver cannot tell who calls. The operator makes a secret for your tenant with
    `arrowquant webhooks secret create --tenant <tenant>`, and gives it to you.
    """

    code = "webhook_secret_missing"


class ExceedsMemory(RequestError):
    """The job needs more memory than all jobs together may have.

    It is the row blocks of its largest tensor that count, for every output that stores it in another way. Ask for
    fewer ways at once, or have the operator lower `block_bytes` or raise `memory_limit_bytes`.
    """

    code = "exceeds_memory"


class InvalidCalibration(RequestError):
    """The calibration is not that of the model, or not what it claims to be.

    Its file holds statistics of the inputs of layers, named after the model's tensors and shaped as these are. The
    README lists its fields, and `examples/collect_calibration.py` writes one.
    """

    code = "invalid_calibration"


class InvalidTable(RequestError):
    """The Arrow table is not what this call takes."""

    code = "invalid_table"


class ModelError(ArrowQuantError):
    """The model's files are not what they claim to be."""

    code = "model_error"


class CorruptModel(ModelError):
    """A file of the model is damaged.

    It is truncated, or its header contradicts itself or the file's size.
    """

    code = "corrupt_model"


class UnknownDtype(ModelError):
    """A tensor has a dtype that this service does not know."""

    code = "unknown_dtype"


class NonFiniteWeights(ModelError):
    """A tensor holds a NaN or an infinity.

    Mend the model, exclude the tensor with `skip`, or set `on_non_finite` to `copy`.
    """

    code = "non_finite_weights"


class ModelsDiffer(ModelError):
    """The two models do not have the same tensors."""

    code = "models_differ"


class SourceChanged(ModelError):
    """The source changed or vanished while it was being read."""

    code = "source_changed"


class RunError(ArrowQuantError):
    """The work could not be finished."""

    code = "run_error"


class AccuracyTooLow(RunError):
    """A tensor misses `min_accuracy`.

    Give it more bits with `layers`, lower `min_accuracy`, or set `on_failure` to `fallback` or `warn`.
    """

    code = "accuracy_too_low"


class DiskFull(RunError):
    """The disk is full.

    What a job had written is removed, what has come of an upload is kept. Free some space and try again.
    """

    code = "disk_full"


class StorageFailure(RunError):
    """Reading or writing a file failed."""

    code = "storage_failure"


class StoreUnavailable(StorageFailure):
    """A bucket or a hub does not answer as it should.

    Several attempts were made. Send the request again when the store is well; what a job had written is removed.
    """

    code = "store_unavailable"


class Cancelled(RunError):
    """The job was cancelled."""

    code = "job_cancelled"


class TimedOut(RunError):
    """The job ran longer than its `timeout_s`.

    Only the time in which it had its turn counts.
    """

    code = "job_timeout"


class PendingTimedOut(RunError):
    """The job did not begin within its `max_pending_s`.

    Others had the better claim all the time. Submit it again, with more time, or with a higher `priority` than your
    other jobs have.
    """

    code = "pending_timeout"


class InternalError(RunError):
    """The service has a fault.

    The id in `detail` is also in the server's log.
    """

    code = "internal_error"


class ServiceError(ArrowQuantError):
    """The service cannot take this call."""

    code = "service_error"


class Unauthorized(ServiceError):
    """The call needs a key.

    Send `Authorization: Bearer <key>`. The operator makes keys with `arrowquant keys create`.
    """

    code = "unauthorized"


class ForbiddenScope(ServiceError):
    """The key is not good for this call.

    `read` is for looking, `submit` for whatever starts, cancels or deletes, `admin` for everything and everybody.
    """

    code = "forbidden_scope"


class RateLimited(ServiceError):
    """Too many requests.

    `RateLimit-Policy` says how many may come in a time, `Retry-After` when the next one may.
    """

    code = "rate_limited"


class TooManyOpenJobs(ServiceError):
    """The tenant has as many open jobs as it may.

    Open are those that have not ended. Wait for one to end, or cancel one.
    """

    code = "too_many_open_jobs"


class NotFound(ServiceError):
    """There is no such resource."""

    code = "not_found"


class ArtifactsExpired(ServiceError):
    """The job's files are kept no longer.

    The operator has set how long or how many of them are kept. The job, its report and what was written to a `uri` of
    its own are still there. Run the job again to have its files.
    """

    code = "artifacts_expired"


class NotReady(ServiceError):
    """The service is not ready."""

    code = "not_ready"


class NotFinished(ServiceError):
    """The job has no result yet.

    Follow its events, or ask with `Prefer: wait=60`.
    """

    code = "job_not_finished"


class NotTerminal(ServiceError):
    """The job has not ended.

    Only a job or a batch that has ended can be purged. Cancel it first.
    """

    code = "job_not_terminal"


class JobInUse(ServiceError):
    """A job that has not ended reads what this one wrote.

    A job can be purged, alone or with its batch, when no job that waits or runs has it as its source. Wait for those to
    end, or cancel them first.
    """

    code = "job_in_use"


class QueueFull(ServiceError):
    """The queue is full, or what is left of it is kept for tenants that have no job waiting.

    Try again after the time in `Retry-After`.
    """

    code = "queue_full"


class LookupsBusy(ServiceError):
    """A webhook's host could not be looked up yet.

    Other names are being looked up and take long, most likely those of your own webhooks. Try again after the time in
    `Retry-After`.
    """

    code = "lookups_busy"


class Draining(ServiceError):
    """The server is shutting down and takes no new jobs."""

    code = "draining"


class UploadInProgress(ServiceError):
    """Another call is sending this blob.

    Ask with HEAD how far it is, and go on when it has ended.
    """

    code = "upload_in_progress"


class UploadOffsetMismatch(ServiceError):
    """The range does not start where the upload stands.

    The header `Upload-Offset` says how many bytes are here: go on from there.
    """

    code = "upload_offset_mismatch"


class IdempotencyKeyReused(ServiceError):
    """This idempotency key was used with another body.

    A key stands for one call for 24 hours. Make a new one, such as a UUID, for each thing that you want made.
    """

    code = "idempotency_key_reused"


class IdempotencyKeyInFlight(ServiceError):
    """The first call with this idempotency key is still in flight.

    It is until it has been answered, which with `Prefer: wait` may take a minute. Send the call again then, and it gets
    the same answer.
    """

    code = "idempotency_key_in_flight"


class IllegalTransition(ServiceError):
    """The job's state does not allow this."""

    code = "illegal_transition"

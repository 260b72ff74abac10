//! Which request does what: the handlers, and with them the API's document.
//!
//! A handler's comment, its annotation and its types are what the document says of it. Whatever waits for
//! a VM runs in a thread of the pool ([`blocking`]); what only waits for news does not.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{Method, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use tokio::sync::broadcast::error::RecvError;
use tracing::{Instrument as _, Span};
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::config::VmConfig;
use super::error::{ControlError, Problem};
use super::events::Event;
use super::extract::{Fields, Input, Name, Options, Removal};
use super::metrics::METRICS_TYPE;
use super::problems::{BadBody, BadRequest, Conflict, NoVm, Otherwise};
use super::resources::{ColonyView, MemoryView, RemoveReply, StatsView};
use super::service::Service;
use super::streams;
use super::{ForkReply, ForkRequest, InputReply, ResetView, StateRequest, StopReply, VmList, VmView};

/// What all handlers know.
type Known = State<Arc<Service>>;
type Answer<T> = Result<Json<T>, Problem>;

/// Lines of JSON.
const LINES_TYPE: &str = "application/x-ndjson";

#[derive(OpenApi)]
#[openapi(
    info(
        title = "salp",
        description = "A colony of virtual machines: one that was started, and its clones. \
            HTTP/1.1 over the colony's Unix socket, for its user and root alone. \
            Errors are problem+json (RFC 9457) with a stable code."
    ),
    components(schemas(Problem)),
    servers((url = "http://salp", description = "The colony's Unix socket; the host's name says nothing"))
)]
struct Document;

fn open_router() -> OpenApiRouter<Arc<Service>> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(list, start))
        .routes(routes!(find, set_state, remove))
        .routes(routes!(memory))
        .routes(routes!(stats))
        .routes(routes!(wait))
        .routes(routes!(fork))
        .routes(routes!(reset))
        .routes(routes!(stop))
        .routes(routes!(console, input))
        .routes(routes!(events))
        .routes(routes!(colony))
        .routes(routes!(metrics))
        .routes(routes!(openapi))
}

/// The API's document.
#[must_use]
pub fn document() -> utoipa::openapi::OpenApi {
    open_router().into_openapi()
}

/// All routes of a colony.
pub(super) fn router(service: Arc<Service>) -> Router {
    let (router, _) = open_router().split_for_parts();
    router
        .fallback(nothing_there)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn(logged))
        .with_state(service)
}

/// Whatever is said in the log while a request is done says which.
async fn logged(request: Request, next: Next) -> Response {
    let span = tracing::info_span!("request", method = %request.method(), path = request.uri().path());
    let answer = async {
        let response = next.run(request).await;
        tracing::debug!(status = response.status().as_u16(), "answered");
        response
    };
    answer.instrument(span).await
}

async fn nothing_there(uri: Uri) -> Problem {
    Problem::new(StatusCode::NOT_FOUND, "unknown-path", format!("there is nothing at {}", uri.path()))
}

async fn wrong_method(method: Method, uri: Uri) -> Problem {
    let detail = format!("{method} cannot be done with {}", uri.path());
    Problem::new(StatusCode::METHOD_NOT_ALLOWED, "wrong-method", detail)
}

/// Does in a thread of the pool what waits for VMs. It goes on where the client goes away.
async fn blocking<T: Send + 'static>(
    service: &Arc<Service>,
    act: impl FnOnce(&Service) -> Result<T, ControlError> + Send + 'static,
) -> Result<T, Problem> {
    let (service, span) = (Arc::clone(service), Span::current());
    match tokio::task::spawn_blocking(move || span.in_scope(|| act(&service))).await {
        Ok(result) => result.map_err(Problem::from),
        Err(error) => {
            tracing::error!(%error, "a request was not done");
            Err(Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "failed", error.to_string()))
        }
    }
}

/// List all VMs
///
/// In the order of their numbers, those that have ended too.
#[utoipa::path(get, path = "/v1/vms", tag = "vms",
    responses((status = 200, description = "All of them", body = VmList), Otherwise))]
async fn list(State(service): Known) -> Answer<VmList> {
    blocking(&service, |service| Ok(service.list())).await.map(Json)
}

/// Start another VM
///
/// One that is no clone and shares nothing. It is like the colony's first VM, but for what is said of its
/// name, its kernel and what the guest is told; anything else needs a colony of its own (`salp run`).
#[utoipa::path(post, path = "/v1/vms", tag = "vms", request_body = Option<VmConfig>,
    responses((status = 201, description = "It runs", body = VmView), BadRequest, Conflict, Otherwise))]
async fn start(
    State(service): Known,
    Fields(config): Fields<VmConfig>,
) -> Result<(StatusCode, Json<VmView>), Problem> {
    let start = move |service: &Service| Ok(service.view(&service.start_vm(&config)?));
    Ok((StatusCode::CREATED, Json(blocking(&service, start).await?)))
}

/// Show a VM
#[utoipa::path(get, path = "/v1/vms/{name}", tag = "vms", params(Name),
    responses((status = 200, description = "The VM", body = VmView), NoVm, Otherwise))]
async fn find(State(service): Known, Name { name }: Name) -> Answer<VmView> {
    blocking(&service, move |service| service.find(&name)).await.map(Json)
}

/// Pause a VM, or let it go on
///
/// One that is so already stays as it is.
#[utoipa::path(patch, path = "/v1/vms/{name}", tag = "vms", params(Name), request_body = StateRequest,
    responses((status = 200, description = "The VM", body = VmView), NoVm, BadRequest, Conflict, Otherwise))]
async fn set_state(
    State(service): Known,
    Name { name }: Name,
    Fields(request): Fields<StateRequest>,
) -> Answer<VmView> {
    blocking(&service, move |service| service.set_state(&name, request)).await.map(Json)
}

/// Show a VM's memory, leaf by leaf
///
/// What is zero, exclusive, lent, shared and pinned in each 2 MiB, and which block it shares there with
/// how many VMs. Exact while the VM is paused; otherwise each leaf is looked at once, while it runs.
#[utoipa::path(get, path = "/v1/vms/{name}/memory", tag = "vms", params(Name),
    responses((status = 200, description = "Its memory", body = MemoryView), NoVm, Conflict, Otherwise))]
async fn memory(State(service): Known, Name { name }: Name) -> Answer<MemoryView> {
    blocking(&service, move |service| service.memory(&name)).await.map(Json)
}

/// Remove a VM from the list
///
/// With its console; its name is free then. One that has not ended is refused, or stopped first where
/// that is wished. What its clones need of its memory stays until they do not need it, whether it is
/// listed or not.
#[utoipa::path(delete, path = "/v1/vms/{name}", tag = "vms", params(Name, Removal),
    responses((status = 200, description = "It is removed", body = RemoveReply),
        NoVm, BadRequest, Conflict, Otherwise))]
async fn remove(
    State(service): Known,
    Name { name }: Name,
    Options(Removal { force }): Options<Removal>,
) -> Answer<RemoveReply> {
    blocking(&service, move |service| service.remove(&name, force)).await.map(Json)
}

/// Show what a VM uses and has done
#[utoipa::path(get, path = "/v1/vms/{name}/stats", tag = "vms", params(Name),
    responses((status = 200, description = "Figures", body = StatsView), NoVm, Conflict, Otherwise))]
async fn stats(State(service): Known, Name { name }: Name) -> Answer<StatsView> {
    blocking(&service, move |service| service.stats(&name)).await.map(Json)
}

/// Wait until a VM has ended
///
/// The answer comes when it has, at once if that is so already.
#[utoipa::path(get, path = "/v1/vms/{name}/wait", tag = "vms", params(Name),
    responses((status = 200, description = "The VM, which has ended", body = VmView), NoVm, Otherwise))]
async fn wait(State(service): Known, Name { name }: Name) -> Answer<VmView> {
    // Before the first look: what happens after it is heard.
    let mut listener = service.registry.events().listen().ok_or(ControlError::Ending)?;
    let vm = service.registry.find(&name)?.vm;
    loop {
        // By its number: its name may be another's by now.
        let entry = service.registry.of(vm).ok_or_else(|| ControlError::Unknown(name.clone()))?;
        if !entry.state.is_live() {
            return Ok(Json(service.view(&entry)));
        }
        if let Err(RecvError::Closed) = listener.recv().await {
            return Err(ControlError::Ending.into());
        }
    }
}

/// Clone a VM
///
/// One cut, any number of clones of it. If not all can be had, those that can are made; whether one could
/// not be had, or is there and did not become ready, the status tells too. If none can be had the request
/// fails, and nothing has changed.
#[utoipa::path(post, path = "/v1/vms/{name}/fork", tag = "vms", params(Name),
    request_body = Option<ForkRequest>,
    responses((status = 201, description = "All of them run, or are paused as was wished", body = ForkReply),
        (status = 207, description = "Some have a problem", body = ForkReply),
        NoVm, BadRequest, Conflict, Otherwise))]
async fn fork(
    State(service): Known,
    Name { name }: Name,
    Fields(request): Fields<ForkRequest>,
) -> Result<(StatusCode, Json<ForkReply>), Problem> {
    let reply = blocking(&service, move |service| service.fork(&name, &request)).await?;
    let is_whole = reply.missing.is_empty() && reply.clones.iter().all(|clone| clone.problem.is_none());
    let status = if is_whole { StatusCode::CREATED } else { StatusCode::MULTI_STATUS };
    Ok((status, Json(reply)))
}

/// Return a clone to its cut
///
/// Memory, vCPUs and devices; it runs on from there. Also a clone whose guest has crashed or ended by
/// itself, as long as another VM of its colony lives.
#[utoipa::path(post, path = "/v1/vms/{name}/reset", tag = "vms", params(Name),
    responses((status = 200, description = "It runs", body = ResetView), NoVm, Conflict, Otherwise))]
async fn reset(State(service): Known, Name { name }: Name) -> Answer<ResetView> {
    blocking(&service, move |service| service.reset(&name)).await.map(Json)
}

/// End a VM
///
/// With the last one the colony ends: the connection is closed when nothing of it is left.
#[utoipa::path(post, path = "/v1/vms/{name}/stop", tag = "vms", params(Name),
    responses((status = 200, description = "It is stopped", body = StopReply), NoVm, Conflict, Otherwise))]
async fn stop(State(service): Known, Name { name }: Name) -> Answer<StopReply> {
    blocking(&service, move |service| service.stop(&name)).await.map(Json)
}

/// Follow a VM's console
///
/// Its output from the beginning on, as it comes, until the VM ends.
#[utoipa::path(get, path = "/v1/vms/{name}/console", tag = "console", params(Name),
    responses((status = 200, description = "The output", body = Vec<u8>,
        content_type = "application/octet-stream"), NoVm, Otherwise))]
async fn console(State(service): Known, Name { name }: Name) -> Result<Response, Problem> {
    let console = service.registry.find(&name)?.console;
    let content_type = [(header::CONTENT_TYPE, "application/octet-stream")];
    Ok((content_type, streams::console(console.follow())).into_response())
}

/// Give a VM console input
///
/// As it is. What found no room is to be sent again.
#[utoipa::path(post, path = "/v1/vms/{name}/console", tag = "console", params(Name),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 200, description = "What found room", body = InputReply),
        NoVm, BadBody, Conflict, Otherwise))]
async fn input(State(service): Known, Name { name }: Name, Input(input): Input) -> Answer<InputReply> {
    let given = blocking(&service, move |service| service.input(&name, &input)).await;
    given.map(|accepted_bytes| Json(InputReply { accepted_bytes }))
}

/// Follow what happens
///
/// One JSON object a line, from the `listening` at the beginning on, until the colony ends. `publishing`
/// comes every 100 ms while something is being published.
#[utoipa::path(get, path = "/v1/events", tag = "colony",
    responses((status = 200, description = "Lines of JSON", body = Event, content_type = LINES_TYPE),
        Otherwise))]
async fn events(State(service): Known) -> Result<Response, Problem> {
    let listener = service.registry.events().listen().ok_or(ControlError::Ending)?;
    Ok(([(header::CONTENT_TYPE, LINES_TYPE)], streams::events(service, listener)).into_response())
}

/// Show the colony
#[utoipa::path(get, path = "/v1/colony", tag = "colony",
    responses((status = 200, description = "The colony", body = ColonyView), Otherwise))]
async fn colony(State(service): Known) -> Answer<ColonyView> {
    blocking(&service, |service| service.colony_view()).await.map(Json)
}

/// Figures for Prometheus
///
/// In the OpenMetrics text format. A VM that does not answer within 2 s is left out.
#[utoipa::path(get, path = "/metrics", tag = "colony",
    responses((status = 200, description = "Figures", body = String, content_type = METRICS_TYPE),
        Otherwise))]
async fn metrics(State(service): Known) -> Result<Response, Problem> {
    let text = blocking(&service, |service| service.metrics()).await?;
    Ok(([(header::CONTENT_TYPE, METRICS_TYPE)], text).into_response())
}

/// This document
#[utoipa::path(get, path = "/v1/openapi.json", tag = "colony",
    responses((status = 200, description = "OpenAPI 3.1", body = serde_json::Value)))]
async fn openapi() -> Json<utoipa::openapi::OpenApi> {
    Json(document())
}

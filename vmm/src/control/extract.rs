//! What handlers take from a request. What makes no sense is refused as a problem, whoever notices it.

use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::StatusCode;
use axum::http::request::Parts;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::body::Body as _;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::error::Category;
use serde_json::{Map, Value};
use utoipa::IntoParams;

use super::error::{ControlError, Problem};
use crate::words::wide;

/// The longest body of a request.
const BODY_BYTES: usize = 1 << 20;
/// How long it may take to come.
const BODY_LIMIT: Duration = Duration::from_secs(10);

/// A VM's name, in the path.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub(super) struct Name {
    /// The VM's name
    pub(super) name: String,
}

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let name = Path::<Self>::from_request_parts(parts, state).await;
        let wrong =
            |error: PathRejection| Problem::new(StatusCode::BAD_REQUEST, "bad-request", error.body_text());
        name.map(|Path(name)| name).map_err(wrong)
    }
}

/// How to remove a VM.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct Removal {
    /// Stop it first, if it has not ended
    #[serde(default)]
    pub(super) force: bool,
}

/// What is said behind the path.
pub(super) struct Options<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Options<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let options = Query::<T>::from_request_parts(parts, state).await;
        let wrong =
            |error: QueryRejection| Problem::new(StatusCode::BAD_REQUEST, "bad-request", error.body_text());
        options.map(|Query(options)| Self(options)).map_err(wrong)
    }
}

/// A body as it is.
pub(super) struct Input(pub(super) Bytes);

impl<S: Send + Sync> FromRequest<S> for Input {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        read(request.into_body()).await.map(Self)
    }
}

/// A body in JSON, whatever its media type is said to be; none at all is an object without fields.
pub(super) struct Fields<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Fields<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        let body = read(request.into_body()).await?;
        let body = if body.is_empty() { b"{}" } else { &*body };
        let object: Map<String, Value> = serde_json::from_slice(body).map_err(refusal)?;
        let fields = T::deserialize(Value::Object(object)).map_err(refusal)?;
        Ok(Self(fields))
    }
}

fn refusal(error: serde_json::Error) -> ControlError {
    match error.classify() {
        Category::Data => ControlError::Meaningless(error.to_string()),
        Category::Syntax | Category::Eof | Category::Io => ControlError::Malformed(error.to_string()),
    }
}

async fn read(body: Body) -> Result<Bytes, Problem> {
    let too_large = || {
        let detail = format!("a body of more than {BODY_BYTES} bytes");
        Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "too-large", detail)
    };
    // Whoever says how much it is need not send it.
    if body.size_hint().lower() > wide(BODY_BYTES) {
        return Err(too_large());
    }
    let whole = tokio::time::timeout(BODY_LIMIT, Limited::new(body, BODY_BYTES).collect()).await;
    let Ok(whole) = whole else {
        let detail = format!("the body did not come within {} s", BODY_LIMIT.as_secs());
        return Err(Problem::new(StatusCode::REQUEST_TIMEOUT, "too-slow", detail));
    };
    whole.map(http_body_util::Collected::to_bytes).map_err(|error| match error.is::<LengthLimitError>() {
        true => too_large(),
        false => Problem::new(StatusCode::BAD_REQUEST, "bad-request", error.to_string()),
    })
}

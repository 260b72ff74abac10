//! Why something could not be done for a user, and how that goes over the control socket: as
//! `application/problem+json` (RFC 9457) with an HTTP status and a stable code.

use std::io;
use std::path::PathBuf;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use utoipa::ToSchema;

use super::MOST_CLONES;
use crate::keeper::ColonyError;
use crate::words::MemoryShapeError;

/// The media type of a [`Problem`].
pub const PROBLEM_TYPE: &str = "application/problem+json";

/// Why something could not be done for a user.
#[derive(Debug, Error)]
pub enum ControlError {
    /// A name that no VM has.
    #[error("no vm is called {0}: `salp ps` lists all")]
    Unknown(String),
    /// A name that a VM has.
    #[error("{0} is taken: another vm has that name, choose a different one with --name")]
    Taken(String),
    /// A text that cannot be a name.
    #[error("{0:?} cannot be a name: use 1 to 63 letters, digits, '-', '_' or '.', a letter or digit first")]
    BadName(String),
    /// The VM has ended.
    #[error("{name} does not run any more: {how}")]
    NotRunning {
        /// Its name.
        name: String,
        /// How it ended.
        how: String,
    },
    /// The VM has not ended.
    #[error("{0} has not ended: stop it first, or remove it by force")]
    StillRuns(String),
    /// The VM cannot be reset.
    #[error("{name} cannot be reset: {reason}")]
    NotResettable {
        /// Its name.
        name: String,
        /// Why not.
        reason: String,
    },
    /// Its colony was killed.
    #[error("the colony of {0} was killed: {0} is gone, what was left of it is cleaned up")]
    Stale(String),
    /// The number of clones makes no sense.
    #[error("{0} clones at once are not possible: give 1 to {MOST_CLONES}")]
    Count(u64),
    /// The colony is ending.
    #[error("the colony is ending")]
    Ending,
    /// A request that is no JSON of its kind.
    #[error("the request's body: {0}")]
    Malformed(String),
    /// A request whose JSON says something else than what is asked for there.
    #[error("the request's body: {0}")]
    Meaningless(String),
    /// The directory of names is not to be trusted.
    #[error("{} is not used for sockets: {why}", path.display())]
    Place {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The host refused something.
    #[error("cannot {action} {}: {source}", path.display())]
    Host {
        /// What was being done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// A keeper does not answer.
    #[error(
        "the keeper {keeper_pid} does not answer within {seconds} s: is it stopped, or the host very busy? \
         (`kill -CONT {keeper_pid}` lets it go on, `kill -KILL {keeper_pid}` ends it and its VMs)"
    )]
    Silent {
        /// Its process.
        keeper_pid: i32,
        /// How long it was waited for.
        seconds: u64,
    },
    /// What came over a socket makes no sense.
    #[error("the colony's socket: {0}")]
    Protocol(String),
    /// The socket.
    #[error("the colony's socket: {0}")]
    Socket(#[from] io::Error),
    /// The colony.
    #[error("{0}")]
    Colony(#[from] ColonyError),
    /// The memory size.
    #[error("{0}")]
    Shape(#[from] MemoryShapeError),
    /// A kernel cannot be started.
    #[error("--kernel {}: {reason}", path.display())]
    Kernel {
        /// Its file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// A document that says what a VM is to be.
    #[error("{}: {reason}", path.display())]
    Config {
        /// Its file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A VM that the colony cannot have.
    #[error("this colony cannot have such a vm: {what}: {reason}; start a colony of its own with `salp run`")]
    UnlikeColony {
        /// The field.
        what: &'static str,
        /// What its VMs are.
        reason: String,
    },
    /// What a colony answered.
    #[error("{}", .0.detail)]
    Problem(Problem),
}

impl ControlError {
    /// HTTP status and stable code.
    #[must_use]
    pub fn status(&self) -> (StatusCode, &str) {
        match self {
            Self::Malformed(_) | Self::Protocol(_) => (StatusCode::BAD_REQUEST, "bad-request"),
            Self::Unknown(_) => (StatusCode::NOT_FOUND, "unknown-vm"),
            Self::Taken(_) => (StatusCode::CONFLICT, "name-taken"),
            Self::NotRunning { .. } => (StatusCode::CONFLICT, "not-running"),
            Self::StillRuns(_) => (StatusCode::CONFLICT, "still-runs"),
            Self::NotResettable { .. } => (StatusCode::CONFLICT, "not-resettable"),
            Self::Meaningless(_) => (StatusCode::UNPROCESSABLE_ENTITY, "bad-fields"),
            Self::UnlikeColony { .. } => (StatusCode::UNPROCESSABLE_ENTITY, "unlike-colony"),
            Self::Kernel { .. } => (StatusCode::UNPROCESSABLE_ENTITY, "bad-kernel"),
            Self::Host { action: "open", .. } => (StatusCode::UNPROCESSABLE_ENTITY, "no-file"),
            Self::BadName(_) => (StatusCode::UNPROCESSABLE_ENTITY, "bad-name"),
            Self::Count(_) => (StatusCode::UNPROCESSABLE_ENTITY, "bad-count"),
            Self::Colony(error) => colony_status(error),
            Self::Ending => (StatusCode::SERVICE_UNAVAILABLE, "colony-ending"),
            Self::Problem(problem) => {
                let status = StatusCode::from_u16(problem.status);
                (status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), &problem.code)
            }
            _ => (StatusCode::INTERNAL_SERVER_ERROR, "failed"),
        }
    }
}

fn colony_status(error: &ColonyError) -> (StatusCode, &'static str) {
    match error {
        ColonyError::Limit(_) => (StatusCode::CONFLICT, "limit-reached"),
        ColonyError::Identity(_) => (StatusCode::UNPROCESSABLE_ENTITY, "bad-identity"),
        ColonyError::Refused { .. } => (StatusCode::UNPROCESSABLE_ENTITY, "refused"),
        ColonyError::NotReady { .. } => (StatusCode::SERVICE_UNAVAILABLE, "not-ready"),
        ColonyError::Members(_) => (StatusCode::SERVICE_UNAVAILABLE, "no-room"),
        ColonyError::Silent { .. } => (StatusCode::SERVICE_UNAVAILABLE, "silent-vm"),
        // Who asked has found it by its name: it has ended since.
        ColonyError::NoVm(_) | ColonyError::Died(_) => (StatusCode::CONFLICT, "not-running"),
        _ => (StatusCode::INTERNAL_SERVER_ERROR, "failed"),
    }
}

/// An error as it goes over the socket (RFC 9457).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// What kind it is, for people: the status's standard phrase.
    pub title: String,
    /// HTTP status.
    pub status: u16,
    /// What happened here.
    pub detail: String,
    /// What kind it is, for programs. It does not change from version to version.
    #[schema(example = "unknown-vm")]
    pub code: String,
}

impl Problem {
    /// A problem of this kind.
    #[must_use]
    pub fn new(status: StatusCode, code: &str, detail: impl Into<String>) -> Self {
        Self {
            title: status.canonical_reason().unwrap_or_default().to_owned(),
            status: status.as_u16(),
            detail: detail.into(),
            code: code.to_owned(),
        }
    }
}

impl From<ControlError> for Problem {
    fn from(error: ControlError) -> Self {
        let (status, code) = error.status();
        Self::new(status, code, error.to_string())
    }
}

impl From<&ColonyError> for Problem {
    fn from(error: &ColonyError) -> Self {
        let (status, code) = colony_status(error);
        Self::new(status, code, error.to_string())
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, Json(self)).into_response();
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(PROBLEM_TYPE));
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::{FamilyError, VmId};

    #[test]
    fn a_vm_that_has_ended_since_it_was_found_is_no_failure() {
        let gone = VmId(29);
        for error in [ColonyError::NoVm(gone), FamilyError::NoVm(gone).into(), ColonyError::Died(gone)] {
            assert_eq!(colony_status(&error), (StatusCode::CONFLICT, "not-running"), "{error}");
        }
    }
}

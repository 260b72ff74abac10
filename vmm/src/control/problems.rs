//! The errors that the API's document promises, by what can go wrong with a request.

use std::collections::BTreeMap;

use utoipa::openapi::{Content, Ref, RefOr, Response, ResponseBuilder};
use utoipa::{IntoResponses, ToSchema as _};

use super::error::{PROBLEM_TYPE, Problem};

/// Makes a type of each group of errors: statuses, and what they mean.
macro_rules! problems {
    ($($(#[$doc:meta])* $group:ident { $($status:literal: $text:literal),+ $(,)? })+) => {$(
        $(#[$doc])*
        pub(super) struct $group;

        impl IntoResponses for $group {
            fn responses() -> BTreeMap<String, RefOr<Response>> {
                [$(($status, $text)),+].into_iter().map(problem).collect()
            }
        }
    )+};
}

problems! {
    /// The request names a VM.
    NoVm {
        "400": "The name is no text (`bad-request`)",
        "404": "No VM has that name (`unknown-vm`)",
    }
    /// The request has a body of any kind.
    BadBody {
        "400": "Name or body are not to be read (`bad-request`)",
        "408": "The body did not come (`too-slow`)",
        "413": "The body is too large (`too-large`)",
    }
    /// The request has a body in JSON, or a query.
    BadRequest {
        "400": "Name, query or body are not to be read (`bad-request`)",
        "408": "The body did not come (`too-slow`)",
        "413": "The body is too large (`too-large`)",
        "422": "The body says something that is not possible (`bad-fields`, `bad-name`, `bad-count`, \
            `bad-identity`, `bad-kernel`, `no-file`, `unlike-colony`, `refused`)",
    }
    /// The VM may not be in the state for it.
    Conflict {
        "409": "Not possible now (`not-running`, `still-runs`, `not-resettable`, `name-taken`, \
            `limit-reached`)",
    }
    /// What can happen to any request.
    Otherwise {
        "403": "The colony is another user's (`not-yours`)",
        "503": "Not now (`busy`, `colony-ending`, `no-room`, `silent-vm`, `not-ready`)",
        "default": "Something failed (`failed`)",
    }
}

fn problem((status, text): (&str, &str)) -> (String, RefOr<Response>) {
    let content = Content::builder().schema(Some(Ref::from_schema_name(Problem::name()))).build();
    let response = ResponseBuilder::new().description(text).content(PROBLEM_TYPE, content);
    (status.to_owned(), response.build().into())
}

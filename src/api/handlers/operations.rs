//! Long work, and what happened.

use std::convert::Infallible;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;

use crate::agent::EventRecord;
use crate::api::body::Params;
use crate::api::convert;
use crate::api::error::ApiError;
use crate::api::routes::Served;
use crate::api::types::{ErrorBody, EventsQuery, Operation, OperationList};
use crate::report::Retry;

/// List the operations that are kept, newest first.
#[utoipa::path(
    get, path = "/v1/operations", tag = "operations",
    responses((status = 200, body = OperationList), (status = "5XX", body = ErrorBody))
)]
pub(in crate::api) async fn list_operations(State(served): State<Served>) -> Result<Json<OperationList>, ApiError> {
    let operations = served.door.operations().await?;
    Ok(Json(OperationList { operations: operations.iter().map(convert::operation).collect() }))
}

/// Show an operation.
#[utoipa::path(
    get, path = "/v1/operations/{id}", tag = "operations",
    params(("id" = String, Path, description = "Id, or unique start of an id")),
    responses((status = 200, body = Operation), (status = "4XX", body = ErrorBody))
)]
pub(in crate::api) async fn show_operation(
    State(served): State<Served>,
    Path(id): Path<String>,
) -> Result<Json<Operation>, ApiError> {
    match served.door.operation(&id).await? {
        Some(operation) => Ok(Json(convert::operation(&operation))),
        None => {
            let message = format!("there is no operation {id:?}, or several start like this");
            Err(ApiError::new(StatusCode::NOT_FOUND, "not_found", message, Retry::Never))
        }
    }
}

/// What happened, in order: one JSON object per line.
#[utoipa::path(
    get, path = "/v1/events", tag = "operations", params(EventsQuery),
    responses(
        (status = 200, body = String, content_type = "application/x-ndjson", description = "Lines of Event"),
        (status = 410, body = ErrorBody, description = "Events after `since` are not kept any more"),
        (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    )
)]
pub(in crate::api) async fn list_events(
    State(served): State<Served>,
    Params(query): Params<EventsQuery>,
) -> Result<Response, ApiError> {
    let EventsQuery { since, follow } = query;
    let first = served.door.events(since).await?;
    if let Some(oldest) = first.first().filter(|oldest| since > 0 && oldest.seq > since + 1) {
        let message =
            format!("events up to {} are not kept any more: the history starts at {}", oldest.seq - 1, oldest.seq);
        return Err(ApiError::new(StatusCode::GONE, "events_dropped", message, Retry::WithChange)
            .with_detail(format!("look at how things are now, and go on with since={}", oldest.seq - 1)));
    }
    let reader = Reader { last: served.door.last_event(), served, since, follow, page: Some(first) };
    let lines = stream::unfold(reader, |mut reader| async move {
        let bytes = reader.next().await?;
        Some((Ok::<_, Infallible>(bytes), reader))
    });
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response())
}

/// Reads events page by page, only as fast as the client takes them.
struct Reader {
    served: Served,
    last: tokio::sync::watch::Receiver<u64>,
    since: u64,
    follow: bool,
    page: Option<Vec<EventRecord>>,
}

impl Reader {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            let page = match self.page.take() {
                Some(page) => page,
                None => self.served.door.events(self.since).await.ok()?,
            };
            if let Some(newest) = page.last() {
                self.since = newest.seq;
                return Some(lines(page));
            }
            if !self.follow {
                return None;
            }
            let since = self.since;
            // An error means that the agent is ending.
            self.last.wait_for(|last| *last > since).await.ok()?;
        }
    }
}

fn lines(page: Vec<EventRecord>) -> Bytes {
    let mut text = Vec::new();
    for event in page {
        // These types hold nothing that JSON cannot say, and a vector takes everything.
        let _ = serde_json::to_writer(&mut text, &convert::event(event));
        text.push(b'\n');
    }
    text.into()
}

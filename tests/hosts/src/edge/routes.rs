//! HTTP in front of the guests.

use std::collections::BTreeMap;

use axum::Json;
use axum::Router;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::{IntoResponse, Response as HttpResponse};
use axum::routing::get;
use serde::Deserialize;

use super::guests::{GuestName, Guests};
use super::request::{Response, handle};
use crate::counts::Snapshot;

pub(super) fn router(guests: Guests) -> Router {
    Router::new()
        .route("/policy", get(policy))
        .route("/policy/{*path}", get(policy))
        .route("/transform", get(transform))
        .route("/faulty", get(faulty))
        .route("/counts", get(counts))
        .with_state(guests)
}

async fn policy(State(guests): State<Guests>, uri: Uri, headers: HeaderMap) -> HttpResponse {
    let target = uri.to_string();
    respond(
        handle(
            &guests,
            GuestName::Policy,
            target.clone(),
            header_texts(&headers),
            target.as_bytes(),
        )
        .await,
    )
}

#[derive(Deserialize)]
struct TransformQuery {
    op: TransformOperation,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum TransformOperation {
    Upper,
    Rot13,
    Words,
    Gray,
}

async fn transform(
    State(guests): State<Guests>,
    uri: Uri,
    headers: HeaderMap,
    Query(query): Query<TransformQuery>,
) -> HttpResponse {
    let input = match query.op {
        TransformOperation::Upper => "upper",
        TransformOperation::Rot13 => "rot13",
        TransformOperation::Words => "words",
        TransformOperation::Gray => "gray",
    };
    respond(
        handle(
            &guests,
            GuestName::Transform,
            uri.to_string(),
            header_texts(&headers),
            input.as_bytes(),
        )
        .await,
    )
}

#[derive(Deserialize)]
struct FaultyQuery {
    kind: FaultKind,
}

/// How the guest is to fail, in the words of the counts.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum FaultKind {
    MemoryOutOfBounds,
    Unreachable,
    IntegerDivisionByZero,
    StackOverflow,
    HostError,
    None,
}

async fn faulty(
    State(guests): State<Guests>,
    uri: Uri,
    headers: HeaderMap,
    Query(query): Query<FaultyQuery>,
) -> HttpResponse {
    let input = match query.kind {
        FaultKind::MemoryOutOfBounds => "memory_out_of_bounds",
        FaultKind::Unreachable => "unreachable",
        FaultKind::IntegerDivisionByZero => "integer_division_by_zero",
        FaultKind::StackOverflow => "stack_overflow",
        FaultKind::HostError => "host_error",
        FaultKind::None => "none",
    };
    respond(
        handle(
            &guests,
            GuestName::Faulty,
            uri.to_string(),
            header_texts(&headers),
            input.as_bytes(),
        )
        .await,
    )
}

/// What has been counted so far; requests that are being worked on are in it as far as they have come.
async fn counts(State(guests): State<Guests>) -> Json<Snapshot> {
    Json(guests.counts().snapshot())
}

/// Headers whose values are text.
fn header_texts(headers: &HeaderMap) -> BTreeMap<String, String> {
    let texts = headers
        .iter()
        .filter_map(|(name, value)| Some((name.to_string(), value.to_str().ok()?.to_owned())));
    texts.collect()
}

fn respond(result: anyhow::Result<Response>) -> HttpResponse {
    match result {
        Ok(response) => match StatusCode::from_u16(response.status) {
            Ok(status) => (status, response.body).into_response(),
            Err(_) => (
                StatusCode::BAD_GATEWAY,
                "the guest answered with a status that HTTP does not have\n",
            )
                .into_response(),
        },
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}\n")).into_response(),
    }
}

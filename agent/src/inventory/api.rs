//! `GET /api/v1/inventory`: the inventory as JSON, a [`super::Snapshot`].

use std::sync::Arc;

use axum::routing::get;
use axum::{Json, Router};

use super::Inventory;

/// The route that serves an inventory.
pub fn routes(inventory: Arc<Inventory>) -> Router {
    Router::new().route(
        "/api/v1/inventory",
        get(move || async move { Json(inventory.snapshot()) }),
    )
}

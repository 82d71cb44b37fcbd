//! VMs on their way from host to host.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;

use super::vms::Nothing;
use crate::api::body::{JsonBody, OptionalBody};
use crate::api::convert;
use crate::api::error::ApiError;
use crate::api::routes::Served;
use crate::api::types::{ErrorBody, MigrateRequest, Migration, MigrationEstimate, MigrationList, Vm};

/// Move a VM to another host: answered when it runs there. It stands still for milliseconds; its addresses, its memory and
/// its network connections stay; programs that were run in it and consoles are cut off.
#[utoipa::path(
    post, path = "/v1/vms/{id}/migrate", tag = "migrations", request_body = MigrateRequest,
    params(("id" = String, Path, description = "Id, unique start of an id, or name")),
    responses(
        (status = 200, body = Vm, description = "It runs there"),
        (status = 202, body = Vm, description = "Its migration has begun"),
        (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    )
)]
pub(in crate::api) async fn migrate_vm(
    State(served): State<Served>,
    Path(id): Path<String>,
    body: JsonBody<MigrateRequest>,
) -> Result<(StatusCode, Json<Vm>), ApiError> {
    let order = convert::migrate_order(body.value);
    let status = if order.wait { StatusCode::OK } else { StatusCode::ACCEPTED };
    let vm = served.door.migrate(&id, order).await?;
    Ok((status, Json(convert::vm(&vm, &served.host))))
}

/// What moving a VM to another host would be like. The other host is asked whether it would take it; nothing is moved.
#[utoipa::path(
    post, path = "/v1/vms/{id}/migrate/estimate", tag = "migrations", request_body = MigrateRequest,
    params(("id" = String, Path, description = "Id, unique start of an id, or name")),
    responses(
        (status = 200, body = MigrationEstimate),
        (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    )
)]
pub(in crate::api) async fn estimate_migration(
    State(served): State<Served>,
    Path(id): Path<String>,
    body: JsonBody<MigrateRequest>,
) -> Result<Json<MigrationEstimate>, ApiError> {
    let estimate = served.door.estimate_migration(&id, convert::migrate_order(body.value)).await?;
    Ok(Json(convert::estimate(estimate)))
}

/// List the migrations from and to this host that are kept, newest first.
#[utoipa::path(
    get, path = "/v1/migrations", tag = "migrations",
    responses((status = 200, body = MigrationList), (status = "5XX", body = ErrorBody))
)]
pub(in crate::api) async fn list_migrations(State(served): State<Served>) -> Result<Json<MigrationList>, ApiError> {
    let migrations = served.door.migrations().await?;
    Ok(Json(MigrationList { migrations: migrations.iter().map(convert::migration).collect() }))
}

/// Show a migration.
#[utoipa::path(
    get, path = "/v1/migrations/{id}", tag = "migrations",
    params(("id" = String, Path, description = "Id, or unique start of an id")),
    responses((status = 200, body = Migration), (status = "4XX", body = ErrorBody))
)]
pub(in crate::api) async fn show_migration(
    State(served): State<Served>,
    Path(id): Path<String>,
) -> Result<Json<Migration>, ApiError> {
    Ok(Json(convert::migration(&served.door.migration(&id).await?)))
}

/// Give a migration up, as long as the VM is not the other host's: answered when the VM goes on here as before.
#[utoipa::path(
    post, path = "/v1/migrations/{id}/cancel", tag = "migrations",
    params(("id" = String, Path, description = "Id, or unique start of an id")),
    responses((status = 200, body = Migration), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody))
)]
pub(in crate::api) async fn cancel_migration(
    State(served): State<Served>,
    Path(id): Path<String>,
    OptionalBody(Nothing {}): OptionalBody<Nothing>,
) -> Result<Json<Migration>, ApiError> {
    Ok(Json(convert::migration(&served.door.cancel_migration(&id).await?)))
}

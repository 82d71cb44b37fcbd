//! The table of routes: each function's attribute says method, path and answers, and makes its part of the OpenAPI
//! document.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, Method, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use tracing::Instrument;
use utoipa::OpenApi;
use utoipa::openapi::{RefOr, Responses};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::error::{ApiError, ErrorCode};
use super::handlers::{
    balloon, bundles, calculations, clusters, exec, fetches, host, images, migrations, operations, pools, sessions,
    swap, transfers, vms, volumes,
};
use super::http::Client;
use super::types;
use crate::agent::{Door, NoRoom};
use crate::report::Retry;

/// What handlers work with.
#[derive(Clone)]
pub struct Served {
    /// The agent.
    pub door: Arc<dyn Door>,
    /// This host's name.
    pub host: Arc<str>,
    /// The OpenAPI document.
    pub document: Arc<str>,
}

impl std::fmt::Debug for Served {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Served").field("host", &self.host).finish_non_exhaustive()
    }
}

#[derive(OpenApi)]
#[openapi(
    info(title = "Hearth", description = "A per-host microVM agent, over a unix socket."),
    components(schemas(types::Event, types::Drain)),
    tags(
        (name = "vms", description = "Virtual machines"),
        (name = "sessions", description = "VMs that may talk to each other"),
        (name = "images", description = "Images that VMs boot"),
        (name = "bundles", description = "Guests frozen once, to be launched any number of times"),
        (name = "volumes", description = "Block devices that outlive guests, and the leases that say who writes them"),
        (name = "clusters", description = "VMs that register under a name each, and calculations that run in them"),
        (name = "migrations", description = "VMs on their way from host to host"),
        (name = "operations", description = "Long work, and what happened"),
        (name = "host", description = "This host and its agent"),
    )
)]
struct Document;

fn table() -> OpenApiRouter<Served> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(vms::launch_vm, vms::list_vms))
        .routes(routes!(vms::show_vm, vms::remove_vm))
        .routes(routes!(vms::stop_vm))
        .routes(routes!(vms::pause_vm))
        .routes(routes!(vms::resume_vm))
        .routes(routes!(vms::hand_over_vm))
        .routes(routes!(migrations::migrate_vm))
        .routes(routes!(migrations::estimate_migration))
        .routes(routes!(migrations::list_migrations))
        .routes(routes!(migrations::show_migration))
        .routes(routes!(migrations::cancel_migration))
        .routes(routes!(vms::vm_stats))
        .routes(routes!(vms::list_usage))
        .routes(routes!(balloon::set_balloon))
        .routes(routes!(swap::swap_out_vm))
        .routes(routes!(swap::wake_vm))
        .routes(routes!(swap::set_swap_policy))
        .routes(routes!(swap::list_swap_decisions))
        .routes(routes!(exec::exec))
        .routes(routes!(exec::console_history, exec::console))
        .routes(routes!(sessions::create_session, sessions::list_sessions))
        .routes(routes!(sessions::show_session, sessions::remove_session))
        .routes(routes!(sessions::show_fabric))
        .routes(routes!(images::list_images, images::import_image))
        .routes(routes!(images::show_image, images::remove_image))
        .routes(routes!(bundles::build_bundle, bundles::list_bundles))
        .routes(routes!(bundles::show_bundle, bundles::remove_bundle))
        .routes(routes!(bundles::verify_bundle))
        .routes(routes!(bundles::compact_bundle))
        .routes(routes!(bundles::snapshot_vm))
        .routes(routes!(transfers::export_bundle))
        .routes(routes!(transfers::import_bundle))
        .routes(routes!(transfers::sign_bundle))
        .routes(routes!(fetches::fetch_bundle))
        .routes(routes!(fetches::pin_bundle, fetches::unpin_bundle))
        .routes(routes!(fetches::vm_memory))
        .routes(routes!(volumes::attach_volume, volumes::vm_volumes))
        .routes(routes!(volumes::detach_volume))
        .routes(routes!(volumes::create_volume, volumes::list_volumes))
        .routes(routes!(volumes::show_volume, volumes::remove_volume))
        .routes(routes!(volumes::resize_volume))
        .routes(routes!(volumes::digest_volume))
        .routes(routes!(volumes::volume_changes))
        .routes(routes!(volumes::snapshot_volume))
        .routes(routes!(volumes::list_volume_snapshots))
        .routes(routes!(volumes::remove_volume_snapshot))
        .routes(routes!(volumes::acquire_lease, volumes::list_leases))
        .routes(routes!(volumes::convert_lease))
        .routes(routes!(volumes::validate_lease))
        .routes(routes!(volumes::release_lease))
        .routes(routes!(pools::list_pools))
        .routes(routes!(pools::show_pool, pools::set_pool, pools::remove_pool))
        .routes(routes!(clusters::create_cluster, clusters::list_clusters))
        .routes(routes!(clusters::show_cluster, clusters::remove_cluster))
        .routes(routes!(clusters::list_members))
        .routes(routes!(calculations::create_calculation, calculations::list_calculations))
        .routes(routes!(calculations::show_calculation))
        .routes(routes!(operations::list_operations))
        .routes(routes!(operations::show_operation))
        .routes(routes!(operations::list_events))
        .routes(routes!(host::show_host))
        .routes(routes!(host::drain))
        .routes(routes!(host::back_up_ledger))
        .routes(routes!(host::metrics))
        .routes(routes!(host::openapi))
}

/// The OpenAPI document, as text that does not differ from build to build.
pub fn document() -> String {
    let (_, mut document) = table().split_for_parts();
    for path in document.paths.paths.values_mut() {
        let operations = [&mut path.get, &mut path.put, &mut path.post, &mut path.delete];
        for operation in operations.into_iter().flatten() {
            describe(&mut operation.responses);
        }
    }
    // The document holds nothing that JSON cannot say.
    document.to_pretty_json().unwrap_or_default() + "\n"
}

/// Every answer has a description (OpenAPI 3.1, "Response Object"); most are what their status says.
fn describe(responses: &mut Responses) {
    for (status, response) in &mut responses.responses {
        let RefOr::T(response) = response else { continue };
        if response.description.is_empty() {
            response.description = match status.as_str() {
                "200" => "As asked for",
                "201" => "It is there",
                "202" => "It is begun",
                "204" => "It is gone",
                "4XX" => "Not done: the request, or the state of what it is about, does not allow it",
                "5XX" => "Not done: this host, or another one, cannot, or not now",
                _ => "As its status says",
            }
            .to_owned();
        }
    }
}

/// All routes over an agent.
pub fn router(door: Arc<dyn Door>, host: &str) -> Router {
    let served = Served { door, host: host.into(), document: document().into() };
    let (router, _) = table().split_for_parts();
    router
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(served.clone(), observe))
        .with_state(served)
}

async fn unknown_route(request: Request) -> ApiError {
    let message = format!("there is nothing at {:?}", request.uri().path());
    ApiError::new(StatusCode::NOT_FOUND, "not_found", message, Retry::Never)
        .with_detail("GET /v1/openapi.json describes what there is")
}

async fn wrong_method(method: Method, request: Request) -> ApiError {
    let message = format!("{method} is not possible for {:?}", request.uri().path());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message, Retry::Never)
}

/// What makes records without making a VM or a bundle: an agent that is draining refuses these here, and the rest where
/// it is admitted.
const CREATES: [&str; 3] = ["/v1/sessions", "/v1/clusters", "/v1/clusters/{id}/calculations"];

/// Gives each request an id, logs who asked what and how it went, and counts it.
async fn observe(State(served): State<Served>, request: Request, next: Next) -> Response {
    let id = served.door.request_id();
    let client = request.extensions().get::<Client>().copied().unwrap_or_default();
    let matched = request.extensions().get::<axum::extract::MatchedPath>();
    let route = matched.map_or_else(|| "unknown".to_owned(), |path| path.as_str().to_owned());
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let span = tracing::info_span!("request", id, uid = client.uid, pid = client.pid);
    let begun = tokio::time::Instant::now();
    let is_refused =
        method == Method::POST && CREATES.contains(&route.as_str()) && served.door.draining().borrow().has_begun;
    let mut response = if is_refused {
        ApiError::from(NoRoom::Draining).into_response()
    } else {
        next.run(request).instrument(span.clone()).await
    };
    if let Some(ErrorCode(code)) = response.extensions().get() {
        served.door.count_refusal(code);
    }
    let status = response.status().as_u16();
    served.door.count_request(&format!("{method} {route}"), status);
    let took_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    span.in_scope(|| {
        // Reading is frequent and changes nothing; what changes or fails is worth a line.
        if method == Method::GET && status < 400 {
            tracing::debug!(%method, path, status, took_ms, gid = client.gid, "answered");
        } else {
            tracing::info!(%method, path, status, took_ms, gid = client.gid, "answered");
        }
    });
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert("x-request-id", value);
    }
    response.into_response()
}

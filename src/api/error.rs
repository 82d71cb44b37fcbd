//! The only place where errors of the agent become HTTP: status, code, message, retry. Each match is exhaustive, so a
//! new error has to be given its answer here.

mod bundle;
mod cluster;
mod fetch;
mod image;
mod pool;
mod transfer;
mod volume;

use axum::http::header::RETRY_AFTER;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};

use super::types::{ErrorBody, ErrorDetail};
use crate::agent::peers::{PeerError, PeerRefusal, PieceError, TlsError};
use crate::agent::{
    ArriveError, BackUpError, BackupError, BalloonError, Denied, ExecError, FailureCause, FindError, GuestError,
    ImageError, LaunchError, LedgerError, MigrateError, NoRoom, NotRunning, OwnError, SessionError, VerbError, VmError,
    VmState,
};
use crate::report::{Retry, chain};

/// An answer that says no.
#[derive(Debug, Clone)]
pub struct ApiError {
    /// HTTP status, 400 or more.
    pub status: StatusCode,
    /// The body's error.
    pub detail: ErrorDetail,
}

impl ApiError {
    /// An error of this status and code.
    pub fn new(status: StatusCode, code: &str, message: impl Into<String>, retry: Retry) -> Self {
        let detail = ErrorDetail { code: code.to_owned(), message: message.into(), detail: None, retry: retry.into() };
        Self { status, detail }
    }

    /// A request that cannot be understood.
    pub fn bad_request(code: &str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, message, Retry::WithChange)
    }

    /// Adds what to do about it.
    #[must_use]
    pub fn with_detail(mut self, detail: impl Into<String>) -> Self {
        self.detail.detail = Some(detail.into());
        self
    }

    /// The JSON body.
    pub fn body(&self) -> ErrorBody {
        ErrorBody { error: self.detail.clone() }
    }
}

/// The code of an answer that says no, beside it, to be counted.
#[derive(Debug, Clone)]
pub(super) struct ErrorCode(pub(super) String);

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let code = ErrorCode(self.detail.code.clone());
        let status = self.status;
        let mut response = (status, Extension(code), Json(self.body())).into_response();
        if status == StatusCode::LOCKED {
            // Moving takes a fraction of a second, most of the time.
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

impl From<NoRoom> for ApiError {
    fn from(error: NoRoom) -> Self {
        // A full disk has a status of its own; the others are a host that is not there for now.
        let status = match error {
            NoRoom::Disk { .. } => StatusCode::INSUFFICIENT_STORAGE,
            NoRoom::Draining | NoRoom::Descriptors { .. } => StatusCode::SERVICE_UNAVAILABLE,
        };
        Self::new(status, error.code(), error.to_string(), error.retry()).with_detail(error.advice())
    }
}

impl From<BackUpError> for ApiError {
    fn from(error: BackUpError) -> Self {
        let message = chain(&error);
        let (status, code) = match error {
            BackUpError::Backup(BackupError::Exists { .. }) => (StatusCode::CONFLICT, "file_exists"),
            BackUpError::Backup(BackupError::File { .. } | BackupError::Copy { .. }) => {
                (StatusCode::UNPROCESSABLE_ENTITY, "not_backed_up")
            }
            BackUpError::Relative { .. } => (StatusCode::BAD_REQUEST, "relative_path"),
            BackUpError::InMemory => (StatusCode::CONFLICT, "no_ledger_file"),
            BackUpError::Ledger(error) => return error.into(),
        };
        Self::new(status, code, message, Retry::WithChange)
    }
}

impl From<FindError> for ApiError {
    fn from(error: FindError) -> Self {
        let message = error.to_string();
        match error {
            FindError::Unknown { .. } => Self::new(StatusCode::NOT_FOUND, "not_found", message, Retry::Never)
                .with_detail("`hearth vm ls` lists the VMs of this host"),
            FindError::Ambiguous { .. } => Self::new(StatusCode::CONFLICT, "ambiguous_id", message, Retry::WithChange),
        }
    }
}

impl From<Denied> for ApiError {
    fn from(error: Denied) -> Self {
        denied(&error, error.to_string())
    }
}

fn denied(error: &Denied, message: String) -> ApiError {
    let state = error.state.name();
    if matches!(error.state, VmState::Sending | VmState::Arriving { .. } | VmState::HandingOver { .. }) {
        return ApiError::new(StatusCode::LOCKED, "vm_moving", message, Retry::Later)
            .with_detail(format!("the VM's state is {state}: try again when it has arrived, or cancel its migration"));
    }
    ApiError::new(StatusCode::CONFLICT, "illegal_state", message, Retry::WithChange)
        .with_detail(format!("the VM's state is {state}"))
}

impl From<VerbError> for ApiError {
    fn from(error: VerbError) -> Self {
        let (message, retry) = (chain(&error), error.retry());
        match error {
            VerbError::Denied { source, .. } => denied(&source, message),
            VerbError::Filling { .. } => Self::new(StatusCode::LOCKED, "memory_on_its_way", message, retry)
                .with_detail("`hearth vm memory` shows how far it is; ask again when all of it is here"),
            VerbError::HasVolumes { .. } => Self::new(StatusCode::CONFLICT, "vm_has_volumes", message, retry)
                .with_detail("detach them first: `hearth volume detach`"),
            VerbError::Volume { refused, .. } => volume::unchanged(&refused, message, retry),
            VerbError::Busy { .. } => Self::new(StatusCode::TOO_MANY_REQUESTS, "busy", message, retry),
            VerbError::Quarantined { .. } => Self::new(StatusCode::CONFLICT, "vm_quarantined", message, retry)
                .with_detail("find out which of the two is right; `hearth vm rm` ends the VM, and restarting the agent looks again"),
            VerbError::Gone { .. } => Self::new(StatusCode::NOT_FOUND, "not_found", message, retry),
            VerbError::Failed { code, .. } if code == "cancelled" => {
                Self::new(StatusCode::CONFLICT, &code, message, Retry::Later)
            }
            VerbError::Failed { code, .. } if code == "secrets" => {
                Self::new(StatusCode::CONFLICT, &code, message, Retry::WithChange)
            }
            VerbError::Failed { code, .. } => Self::new(StatusCode::INTERNAL_SERVER_ERROR, &code, message, retry),
        }
    }
}

impl From<GuestError> for ApiError {
    fn from(error: GuestError) -> Self {
        let message = chain(&error);
        let status = match error {
            GuestError::TimedOut { .. } => StatusCode::GATEWAY_TIMEOUT,
            GuestError::Open(_)
            | GuestError::Stream(_)
            | GuestError::HungUp
            | GuestError::Frame(_)
            | GuestError::Version { .. }
            | GuestError::Failed { .. }
            | GuestError::Hooks { .. }
            | GuestError::NoRoot { .. }
            | GuestError::Unexpected => StatusCode::BAD_GATEWAY,
        };
        Self::new(status, "guest_unreachable", message, Retry::Later)
    }
}

/// Linux errno: no such file or directory; permission denied; exec format error.
const NOT_A_PROGRAM: [i32; 3] = [2, 13, 8];

impl From<ExecError> for ApiError {
    fn from(error: ExecError) -> Self {
        let message = chain(&error);
        match error {
            ExecError::Invalid { .. } => Self::bad_request("invalid_value", message),
            ExecError::NotStarted { errno, .. } if NOT_A_PROGRAM.contains(&errno) => {
                Self::new(StatusCode::UNPROCESSABLE_ENTITY, "program_not_found", message, Retry::WithChange)
            }
            ExecError::NotStarted { .. } => {
                Self::new(StatusCode::UNPROCESSABLE_ENTITY, "program_not_started", message, Retry::WithChange)
            }
            ExecError::Guest { source, .. } => {
                Self { detail: ErrorDetail { message, ..Self::from(source).detail }, status: StatusCode::BAD_GATEWAY }
            }
        }
    }
}

impl From<VmError> for ApiError {
    fn from(error: VmError) -> Self {
        let message = chain(&error);
        match error {
            VmError::Find(error) => error.into(),
            VmError::Denied(error) => error.into(),
            VmError::Verb(error) => error.into(),
            VmError::Exec(error) => error.into(),
            VmError::Guest(error) => error.into(),
            VmError::Bundle(error) => error.into(),
            VmError::Ledger(error) => error.into(),
            VmError::Balloon(error) => {
                let (status, code) = match &error {
                    BalloonError::None { .. } => (StatusCode::CONFLICT, "no_balloon"),
                    BalloonError::Target { .. } => (StatusCode::UNPROCESSABLE_ENTITY, "balloon_too_large"),
                    BalloonError::Vmm { .. } => (StatusCode::BAD_GATEWAY, "vmm_failure"),
                };
                Self::new(status, code, message, error.retry())
            }
            VmError::Migrate(error) => {
                let (status, code) = match &error {
                    MigrateError::NoFabric => (StatusCode::CONFLICT, "no_fabric"),
                    MigrateError::UnknownPeer { .. } => (StatusCode::NOT_FOUND, "unknown_peer"),
                    MigrateError::SameHost { .. } => (StatusCode::CONFLICT, "same_host"),
                    MigrateError::Tied { .. } => (StatusCode::CONFLICT, "vm_tied"),
                    MigrateError::NotHome { .. } => (StatusCode::CONFLICT, "not_home"),
                    MigrateError::Policy(_) => (StatusCode::UNPROCESSABLE_ENTITY, "invalid_value"),
                    MigrateError::NoTarget { .. } => (StatusCode::CONFLICT, "no_target"),
                    MigrateError::Refused { .. } => (StatusCode::CONFLICT, "target_refuses"),
                    MigrateError::Needs { .. } | MigrateError::Disks { .. } => {
                        (StatusCode::INTERNAL_SERVER_ERROR, "host_failure")
                    }
                    MigrateError::UnknownMigration { .. } => (StatusCode::NOT_FOUND, "not_found"),
                    MigrateError::NotCancellable { .. } => (StatusCode::CONFLICT, "not_cancellable"),
                };
                Self::new(status, code, message, error.retry())
            }
            VmError::NoParent { .. } => Self::new(StatusCode::CONFLICT, "no_parent", message, Retry::WithChange),
            VmError::Console { .. } => Self::new(StatusCode::BAD_GATEWAY, "no_console", message, Retry::Later),
            VmError::History { .. } => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, "host_failure", message, Retry::Later)
            }
        }
    }
}

impl From<ArriveError> for ApiError {
    fn from(error: ArriveError) -> Self {
        let message = chain(&error);
        match error {
            ArriveError::Launch(error) => error.into(),
            ArriveError::Session(error) => error.into(),
            ArriveError::Guest(error) => error.into(),
            ArriveError::Ledger(error) => error.into(),
            ArriveError::Ending => Self::new(StatusCode::SERVICE_UNAVAILABLE, "ending", message, Retry::Later),
            ArriveError::Malformed { .. } => {
                Self::new(StatusCode::UNPROCESSABLE_ENTITY, "bad_arrival", message, Retry::Never)
            }
            ArriveError::OtherDisk { .. } => Self::new(StatusCode::CONFLICT, "other_disk", message, Retry::WithChange),
            ArriveError::Here { .. } => Self::new(StatusCode::CONFLICT, "vm_here", message, Retry::WithChange),
            ArriveError::NotReady { .. } => Self::new(StatusCode::BAD_GATEWAY, "not_ready", message, Retry::Later),
            ArriveError::Unknown { .. } => Self::new(StatusCode::NOT_FOUND, "unknown_migration", message, Retry::Never),
            ArriveError::NotYet { .. } => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "not_running_yet", message, Retry::Later)
            }
        }
    }
}

impl From<PieceError> for ApiError {
    fn from(error: PieceError) -> Self {
        let (message, retry) = (chain(&error), error.retry());
        match error {
            PieceError::Bundle(error) => error.into(),
            PieceError::Bytes { .. } => Self::new(StatusCode::BAD_REQUEST, "part_bytes", message, retry),
            PieceError::Beyond { .. } => {
                Self::new(StatusCode::RANGE_NOT_SATISFIABLE, "part_beyond_end", message, retry)
            }
        }
    }
}

impl From<LedgerError> for ApiError {
    fn from(error: LedgerError) -> Self {
        let (message, retry) = (chain(&error), error.retry());
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "ledger_failure", message, retry)
    }
}

impl From<LaunchError> for ApiError {
    fn from(error: LaunchError) -> Self {
        let (message, retry) = (chain(&error), error.retry());
        let (status, code) = match error {
            LaunchError::Name { .. } => (StatusCode::BAD_REQUEST, "invalid_name"),
            LaunchError::NameTaken { .. } => (StatusCode::CONFLICT, "name_taken"),
            LaunchError::Image(error) => {
                // An image that is not there is the request's fault, not the path's: 404 would say the latter.
                let unknown = matches!(error, ImageError::Unknown { .. });
                let inner = Self::from(error);
                let status = if unknown { StatusCode::UNPROCESSABLE_ENTITY } else { inner.status };
                let detail = unknown.then(|| "`hearth image ls` lists the images of this host".to_owned());
                return Self { status, detail: ErrorDetail { detail, ..inner.detail } };
            }
            LaunchError::Bundle(error) => {
                // As with images: the path is right, what it asks for is not.
                let inner = Self::from(error);
                let unknown = inner.status == StatusCode::NOT_FOUND;
                let status = if unknown { StatusCode::UNPROCESSABLE_ENTITY } else { inner.status };
                return Self { status, detail: inner.detail };
            }
            LaunchError::BundleShape { .. } => (StatusCode::CONFLICT, "bundle_differs"),
            LaunchError::BundleToBuild(error) => return error.into(),
            LaunchError::Build { .. } => (StatusCode::BAD_REQUEST, "invalid_value"),
            LaunchError::Vcpus { .. } => (StatusCode::BAD_REQUEST, "invalid_vcpus"),
            LaunchError::MemoryTooSmall { .. } => (StatusCode::BAD_REQUEST, "memory_too_small"),
            // What the host never has is the request's fault; what it has not now may be there later.
            LaunchError::MemoryTooLarge { found_mib, total_mib, .. } if found_mib > total_mib => {
                (StatusCode::CONFLICT, "insufficient_memory")
            }
            LaunchError::MemoryTooLarge { .. } => (StatusCode::SERVICE_UNAVAILABLE, "insufficient_memory"),
            LaunchError::Volume(error) => {
                // As with images: the path is right, what it asks for is not.
                let inner = Self::from(error);
                let unknown = inner.status == StatusCode::NOT_FOUND;
                let status = if unknown { StatusCode::UNPROCESSABLE_ENTITY } else { inner.status };
                return Self { status, detail: inner.detail };
            }
            LaunchError::VolumeTwice { .. } | LaunchError::VolumesInBuild => {
                (StatusCode::BAD_REQUEST, "invalid_volume")
            }
            LaunchError::Mount { .. } | LaunchError::TwoRoots { .. } => (StatusCode::BAD_REQUEST, "invalid_mount"),
            LaunchError::RootInBundle { .. } => {
                return Self::new(StatusCode::CONFLICT, "bundle_differs", message, retry)
                    .with_detail("launch it from an image, or have the volume mounted at another directory");
            }
            LaunchError::CommandLine { .. } => (StatusCode::UNPROCESSABLE_ENTITY, "command_line_too_long"),
            LaunchError::TooManyDisks { .. } => (StatusCode::BAD_REQUEST, "too_many_disks"),
            LaunchError::DiskPath { .. } => (StatusCode::BAD_REQUEST, "invalid_disk"),
            LaunchError::Disk { .. } => (StatusCode::UNPROCESSABLE_ENTITY, "bad_disk"),
            LaunchError::DiskInUse { .. } => (StatusCode::CONFLICT, "disk_in_use"),
            LaunchError::NetworkLimits(_) => (StatusCode::BAD_REQUEST, "invalid_network_limits"),
            LaunchError::TooManyVms { .. } => (StatusCode::CONFLICT, "too_many_vms"),
            LaunchError::NoUid => (StatusCode::SERVICE_UNAVAILABLE, "no_uid"),
            LaunchError::Session(error) => return error.into(),
            LaunchError::Cluster(error) => {
                // As with images: the path is right, what it asks for is not.
                let inner = Self::from(error);
                let unknown = inner.status == StatusCode::NOT_FOUND;
                let status = if unknown { StatusCode::UNPROCESSABLE_ENTITY } else { inner.status };
                return Self { status, detail: inner.detail };
            }
            LaunchError::ExecutorId { .. } => (StatusCode::BAD_REQUEST, "invalid_executor_id"),
            LaunchError::ExecutorTaken { .. } => {
                return Self::new(StatusCode::CONFLICT, "executor_id_taken", message, retry)
                    .with_detail("`hearth cluster members` shows who has it; take another, or remove that VM first");
            }
            LaunchError::AddressingWithoutSession => (StatusCode::BAD_REQUEST, "addressing_without_session"),
            LaunchError::LazyWithoutBundle => (StatusCode::BAD_REQUEST, "lazy_without_bundle"),
            LaunchError::Role { .. } => (StatusCode::BAD_REQUEST, "invalid_role"),
            LaunchError::Count { .. } => (StatusCode::BAD_REQUEST, "invalid_count"),
            LaunchError::PublishedWithoutSession => (StatusCode::BAD_REQUEST, "publish_without_session"),
            LaunchError::Interfaces { .. } => (StatusCode::BAD_REQUEST, "bad_interfaces"),
            LaunchError::TooManyPorts { .. } => (StatusCode::BAD_REQUEST, "too_many_ports"),
            LaunchError::Port { .. } => (StatusCode::BAD_REQUEST, "bad_port"),
            LaunchError::PortTaken { .. } => (StatusCode::CONFLICT, "port_taken"),
            LaunchError::NoRoom(error) => return error.into(),
            LaunchError::KeyMismatch => (StatusCode::CONFLICT, "idempotency_mismatch"),
            LaunchError::Ending => (StatusCode::SERVICE_UNAVAILABLE, "agent_ending"),
            LaunchError::Host { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "host_failure"),
            LaunchError::Ledger(error) => return error.into(),
        };
        Self::new(status, code, message, retry)
    }
}

impl From<SessionError> for ApiError {
    fn from(error: SessionError) -> Self {
        let (message, retry) = (chain(&error), error.retry());
        let (status, code, todo) = match error {
            SessionError::NoFabric => {
                let todo = "add [fabric] with host_number and ipv6_prefix to /etc/hearth/hearth.toml, then restart \
                            the agent";
                (StatusCode::CONFLICT, "no_fabric", Some(todo))
            }
            SessionError::FabricConflict { .. } => (StatusCode::SERVICE_UNAVAILABLE, "fabric_conflict", None),
            SessionError::Name { .. } => (StatusCode::BAD_REQUEST, "invalid_name", None),
            SessionError::NameTaken { .. } => (StatusCode::CONFLICT, "name_taken", None),
            SessionError::Reserved(_) => (StatusCode::UNPROCESSABLE_ENTITY, "session_id_reserved", None),
            SessionError::NumberTaken { .. } => {
                (StatusCode::CONFLICT, "session_id_taken", Some("`hearth session ls` shows which are in use"))
            }
            SessionError::Resting { .. } => {
                let todo = "wait that long, or leave the network id out to get one that is free";
                (StatusCode::CONFLICT, "session_id_quarantined", Some(todo))
            }
            SessionError::NoNumber { .. } => {
                let todo = "remove sessions, wait for resting ids, or make it with ipv4 false: there are more ids then";
                (StatusCode::CONFLICT, "session_space_exhausted", Some(todo))
            }
            SessionError::TooWide(_) => {
                let todo = "take a smaller network id, or make the session without IPv4";
                (StatusCode::UNPROCESSABLE_ENTITY, "session_id_too_wide_for_ipv4", Some(todo))
            }
            SessionError::ChosenTooWide { .. } => {
                let todo = "give a network id up to 1022 that no other host of the fabric uses, or do without IPv4";
                (StatusCode::UNPROCESSABLE_ENTITY, "session_id_too_wide_for_ipv4", Some(todo))
            }
            SessionError::NoIpv4 => (StatusCode::UNPROCESSABLE_ENTITY, "no_ipv4", None),
            SessionError::Egress(_) => (StatusCode::BAD_REQUEST, "invalid_egress", None),
            SessionError::Ttl { .. } => (StatusCode::BAD_REQUEST, "invalid_ttl", None),
            SessionError::UserData { .. } => (StatusCode::BAD_REQUEST, "user_data_too_long", None),
            SessionError::Unknown { .. } => {
                let todo = "`hearth session ls` lists the sessions of this host";
                (StatusCode::NOT_FOUND, "unknown_session", Some(todo))
            }
            SessionError::Ambiguous { .. } => (StatusCode::CONFLICT, "ambiguous_id", None),
            SessionError::Draining { .. } => (StatusCode::CONFLICT, "session_draining", None),
            SessionError::Expired { .. } => {
                (StatusCode::CONFLICT, "session_expired", Some("make a new session, with a longer ttl or none"))
            }
            SessionError::NoLocal { .. } => {
                let todo = "remove VMs of the session and wait for their addresses to rest, or use a session without \
                            IPv4: it has room for more";
                (StatusCode::CONFLICT, "local_space_exhausted", Some(todo))
            }
            SessionError::InUse { .. } => {
                let todo = "remove its VMs first, or let that be done: `hearth session rm --drain`, ?drain=true";
                (StatusCode::CONFLICT, "session_in_use", Some(todo))
            }
            SessionError::NotDrained { .. } => {
                let todo = "the agent goes on trying; `hearth session show` tells what is left";
                (StatusCode::INTERNAL_SERVER_ERROR, "session_not_drained", Some(todo))
            }
            SessionError::KeyMismatch => (StatusCode::CONFLICT, "idempotency_mismatch", None),
            SessionError::Ending => (StatusCode::SERVICE_UNAVAILABLE, "agent_ending", None),
            SessionError::Host { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "host_failure", None),
            SessionError::Ledger(error) => return error.into(),
        };
        let answer = Self::new(status, code, message, retry);
        match todo {
            Some(todo) => answer.with_detail(todo),
            None => answer,
        }
    }
}

impl From<PeerRefusal> for ApiError {
    fn from(error: PeerRefusal) -> Self {
        let status = match error {
            PeerRefusal::NotStarted => StatusCode::SERVICE_UNAVAILABLE,
            PeerRefusal::Unsigned | PeerRefusal::WrongKey => StatusCode::UNAUTHORIZED,
            PeerRefusal::NoKey
            | PeerRefusal::BeforeStart
            | PeerRefusal::Replay(_)
            | PeerRefusal::Plain { .. }
            | PeerRefusal::OtherSender { .. }
            | PeerRefusal::NotAPeer { .. } => StatusCode::FORBIDDEN,
            PeerRefusal::OtherHost { .. } => StatusCode::MISDIRECTED_REQUEST,
        };
        Self::new(status, error.name(), error.to_string(), Retry::WithChange)
    }
}

impl From<PeerError> for ApiError {
    fn from(error: PeerError) -> Self {
        let (message, retry) = (chain(&error), error.retry());
        let (status, code) = match error {
            // Its status says what was wrong with what was asked for.
            PeerError::Refused { status, code, .. } => {
                let status = StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_GATEWAY);
                return Self::new(status, &code, message, retry);
            }
            PeerError::NotStarted | PeerError::NoKey | PeerError::Request { .. } => {
                (StatusCode::SERVICE_UNAVAILABLE, "peer_unavailable")
            }
            PeerError::Unreachable { .. } => (StatusCode::SERVICE_UNAVAILABLE, "peer_unreachable"),
            PeerError::Tls { source: TlsError::TimedOut { .. }, .. } => (StatusCode::GATEWAY_TIMEOUT, "peer_timeout"),
            PeerError::Tls { source, .. } => (StatusCode::BAD_GATEWAY, source.name()),
            PeerError::TimedOut { .. } => (StatusCode::GATEWAY_TIMEOUT, "peer_timeout"),
            PeerError::Unsealed { .. } | PeerError::KeyRefused { .. } => (StatusCode::BAD_GATEWAY, "peer_key_refused"),
            PeerError::Malformed { .. } => (StatusCode::BAD_GATEWAY, "peer_malformed"),
        };
        Self::new(status, code, message, retry)
    }
}

impl From<OwnError> for ApiError {
    fn from(error: OwnError) -> Self {
        let (message, retry) = (chain(&error), error.retry());
        let (status, code) = match error {
            OwnError::Gone => (StatusCode::NOT_FOUND, "vm_gone"),
            OwnError::NoSession => (StatusCode::FORBIDDEN, "no_session"),
            OwnError::Foreign { .. } => (StatusCode::FORBIDDEN, "foreign_session"),
            OwnError::Busy => (StatusCode::TOO_MANY_REQUESTS, "busy"),
            OwnError::UnknownHost { .. } => (StatusCode::UNPROCESSABLE_ENTITY, "unknown_host"),
            OwnError::Peer(error) => return error.into(),
            OwnError::Launch(error) => return error.into(),
            OwnError::Session(error) => return error.into(),
            OwnError::Registration(refusal) => return refusal.into(),
            OwnError::Ledger(error) => return error.into(),
        };
        Self::new(status, code, message, retry)
    }
}

impl From<NotRunning> for ApiError {
    fn from(error: NotRunning) -> Self {
        let message = chain(&error);
        let id = &error.vm.id;
        let shown = format!("the VM is kept until it is removed: `hearth vm show {id}`, `hearth vm rm {id}`");
        match &error.vm.state {
            VmState::Failed { cause } => {
                let (status, retry) = match cause {
                    FailureCause::BadImage { .. } | FailureCause::BadRoot { .. } => {
                        (StatusCode::UNPROCESSABLE_ENTITY, Retry::WithChange)
                    }
                    FailureCause::Bundle { .. } | FailureCause::Secrets { .. } | FailureCause::WarmUp { .. } => {
                        (StatusCode::UNPROCESSABLE_ENTITY, Retry::WithChange)
                    }
                    FailureCause::Volume { .. } => (StatusCode::SERVICE_UNAVAILABLE, Retry::Later),
                    FailureCause::BundleUnavailable { .. } => (StatusCode::BAD_GATEWAY, Retry::Later),
                    FailureCause::NotRegistered { .. } => (StatusCode::GATEWAY_TIMEOUT, Retry::Later),
                    FailureCause::GuestUnreachable { .. } => (StatusCode::GATEWAY_TIMEOUT, Retry::Later),
                    FailureCause::GuestPanic | FailureCause::GuestFault { .. } => {
                        (StatusCode::BAD_GATEWAY, Retry::WithChange)
                    }
                    FailureCause::VmmError { .. }
                    | FailureCause::VmmKilled { .. }
                    | FailureCause::VmmExited { .. }
                    | FailureCause::VmmGone
                    | FailureCause::Interrupted
                    | FailureCause::LostOnTheWay { .. }
                    | FailureCause::SwapStateCorrupt { .. }
                    | FailureCause::Host { .. } => (StatusCode::INTERNAL_SERVER_ERROR, Retry::Later),
                };
                Self::new(status, cause.name(), message, retry).with_detail(shown)
            }
            VmState::Stopping | VmState::Stopped => {
                Self::new(StatusCode::CONFLICT, "vm_stopped", message, Retry::WithChange).with_detail(shown)
            }
            VmState::Reserved
            | VmState::Launching
            | VmState::Registering
            | VmState::Running
            | VmState::Paused
            | VmState::Saving { .. }
            | VmState::HandingOver { .. }
            | VmState::ChangingVolumes { .. }
            | VmState::SwappingOut { .. }
            | VmState::SwappedOut { .. }
            | VmState::Waking { .. }
            | VmState::Sending
            | VmState::HandedOver
            | VmState::Arriving { .. }
            | VmState::Gone => Self::new(StatusCode::CONFLICT, "vm_gone", message, Retry::WithChange),
        }
    }
}

//! The closed list of things an actor does to the world for its VM. Each looks first and is then a no-op where its
//! result is already there, so performing a list again after a crash is always right.

use serde::{Deserialize, Serialize};

/// Something done to the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// Make the VM's directory. Inverse: [`Effect::RemoveDirectory`].
    MakeDirectory,
    /// Have a jail for the VM, closed: nothing passes. Inverse: [`Effect::RemoveNetwork`].
    MakeNetwork,
    /// Let the VM's own traffic pass its jail. Inverse: [`Effect::RemoveNetwork`].
    OpenNetwork,
    /// Have a VMM process that knows this VM's nonce, and its pid in the record. Inverse: [`Effect::EndVmm`].
    StartVmm,
    /// Have the machine built in the VMM. Inverse: [`Effect::EndVmm`].
    BuildMachine,
    /// Have the machine built in the VMM from the VM's bundle, as it was saved. Inverse: [`Effect::EndVmm`].
    RestoreMachine,
    /// Let the vCPUs run. Inverse: [`Effect::HoldMachine`].
    RunMachine,
    /// Hold the vCPUs. Inverse: [`Effect::RunMachine`].
    HoldMachine,
    /// Wait until the guest agent answers and give it its identity. Nothing to undo: it ends with the VMM.
    GreetGuest,
    /// Set the guest's wall clock. Nothing to undo.
    SetGuestClock,
    /// Run the program that warms a guest up, until it is done or says so. Nothing to undo: it ends with the VMM.
    WarmUp,
    /// Have the guest's file systems at rest. Inverse: [`Effect::ThawGuest`].
    QuiesceGuest,
    /// Let the guest go on after a quiesce and set its wall clock. Nothing to undo.
    ThawGuest,
    /// Have most of the running machine's memory in files of the bundle store, and what it writes from then on known.
    /// Inverse: [`Effect::DiscardSaved`].
    CopyMemory,
    /// Have the state and memory of the held machine in files of the bundle store. Inverse: [`Effect::DiscardSaved`].
    SaveMachine,
    /// Have no such files.
    DiscardSaved,
    /// Have a bundle of them, durable and for all to see. Nothing undoes it.
    CommitBundle,
    /// Wait until the guest has registered with its cluster. Nothing to undo: it ends with the VMM.
    Register,
    /// Keep the machine's taps open beside it, so that packets wait in them whatever becomes of its process, and the
    /// first can be noticed. Inverse: [`Effect::ReleaseTaps`].
    HoldTaps,
    /// Hold the taps no longer: the machine has them.
    ReleaseTaps,
    /// Move the held machine's memory to the host's swap. Nothing to undo: what is touched comes back by itself.
    PageOut,
    /// Have the held machine, encrypted, in a file of the VM's directory. Inverse: [`Effect::DiscardSealed`].
    SealMachine,
    /// Have that file durable and under its name: from here on it is the machine.
    KeepSealed,
    /// Have the machine built in the VMM from its sealed file. Inverse: [`Effect::EndVmm`].
    UnsealMachine,
    /// Have neither the file nor its key: from here on the process is the machine. Nothing undoes it.
    DiscardSealed,
    /// Have another VMM process of this VM, without a machine yet. Inverse: [`Effect::EndOthers`].
    StartSuccessor,
    /// Have the machine in the other process, paused, and that process in the record: from here on it is the machine.
    /// Nothing undoes it.
    MoveMachine,
    /// Have what waits at the process before go over, and the names by which it is reached. Nothing undoes it.
    TakeOver,
    /// Have another host wait for the machine. Inverse: [`Effect::CancelArrival`].
    ArrangeArrival,
    /// Have the machine stand ready at the other host, paused here. Inverse: [`Effect::RunMachine`].
    SendMachine,
    /// Have the leases of the volumes that the VM is to have. Inverse: [`Effect::ReleaseLeases`].
    AcquireLeases,
    /// Have the volume daemon serve the VM's slots as they are to be. Inverse: [`Effect::DisconnectVolumes`].
    ConnectVolumes,
    /// Have the machine's slots hold the volumes that they are to hold, and no others. Nothing to undo: it ends with the VMM.
    PlugVolumes,
    /// Have the guest mount those of its volumes that it is to mount. Inverse: [`Effect::UnmountVolumes`].
    MountVolumes,
    /// Have the guest unmount what it is to give up.
    UnmountVolumes,
    /// Have the volume daemon serve none of the VM's slots but those that are to have a volume.
    DisconnectVolumes,
    /// Have the volume daemon serve the VM's slots by new connections: nothing that came by earlier ones is carried out
    /// any more. Nothing undoes it.
    ReconnectVolumes,
    /// Have no lease but those of the volumes that the VM is to have. Nothing undoes it.
    ReleaseLeases,
    /// Have the standby lease of the first volume be the active one: from here on the VM is the other host's. Nothing
    /// undoes it.
    ConvertLease,
    /// Have the standby leases of the other volumes be active as well. Tried until they are.
    ConvertOthers,
    /// Know whether the lease of the first volume was converted; if it was not, it cannot be any more.
    SettleLease,
    /// Have the other host wait no longer.
    CancelArrival,
    /// Have the other host know that the machine is its, and let it run. Tried until it answers. Nothing undoes it.
    ConfirmArrival,
    /// Have what is sent to the VM's addresses led to the other host. Inverse: [`Effect::OpenNetwork`].
    LeadElsewhere,
    /// Have the packets that waited here follow. Nothing undoes it.
    ForwardPackets,
    /// Have no jail, but the way to the other host. Inverse: [`Effect::MakeNetwork`].
    LeaveNetwork,
    /// Have the machine as another host sends it, paused. Inverse: [`Effect::EndVmm`].
    ReceiveMachine,
    /// Know that the machine is this host's: the other one says so, or is asked. Nothing undoes it.
    AwaitDecision,
    /// Have no VMM process of this VM but the recorded one. Nothing undoes it.
    EndOthers,
    /// Ask the guest to power off and wait for it, up to a bound. Nothing to undo: it leads to [`Effect::EndVmm`].
    ShutDownGuest,
    /// Have no VMM process. Nothing undoes it.
    EndVmm,
    /// Copy what the VMM left behind (last words, last serial lines, log) into the record.
    KeepRemains,
    /// Have no jail and nothing on the host that leads to one. Nothing undoes it.
    RemoveNetwork,
    /// Have no directory. Nothing undoes it.
    RemoveDirectory,
    /// Give the uid back, in quarantine first. Nothing undoes it.
    ReleaseUid,
    /// Delete the record. Nothing undoes it.
    Forget,
}

impl Effect {
    /// The effect's name, as in operations and in the ledger.
    pub const fn name(self) -> &'static str {
        match self {
            Self::MakeDirectory => "make_directory",
            Self::MakeNetwork => "make_network",
            Self::OpenNetwork => "open_network",
            Self::StartVmm => "start_vmm",
            Self::BuildMachine => "build_machine",
            Self::RestoreMachine => "restore_machine",
            Self::WarmUp => "warm_up",
            Self::QuiesceGuest => "quiesce_guest",
            Self::ThawGuest => "thaw_guest",
            Self::CopyMemory => "copy_memory",
            Self::SaveMachine => "save_machine",
            Self::DiscardSaved => "discard_saved",
            Self::CommitBundle => "commit_bundle",
            Self::Register => "register",
            Self::HoldTaps => "hold_taps",
            Self::ReleaseTaps => "release_taps",
            Self::PageOut => "page_out",
            Self::SealMachine => "seal_machine",
            Self::KeepSealed => "keep_sealed",
            Self::UnsealMachine => "unseal_machine",
            Self::DiscardSealed => "discard_sealed",
            Self::StartSuccessor => "start_successor",
            Self::MoveMachine => "move_machine",
            Self::TakeOver => "take_over",
            Self::EndOthers => "end_others",
            Self::ArrangeArrival => "arrange_arrival",
            Self::SendMachine => "send_machine",
            Self::AcquireLeases => "acquire_leases",
            Self::ConnectVolumes => "connect_volumes",
            Self::PlugVolumes => "plug_volumes",
            Self::MountVolumes => "mount_volumes",
            Self::UnmountVolumes => "unmount_volumes",
            Self::DisconnectVolumes => "disconnect_volumes",
            Self::ReconnectVolumes => "reconnect_volumes",
            Self::ReleaseLeases => "release_leases",
            Self::ConvertLease => "convert_lease",
            Self::ConvertOthers => "convert_others",
            Self::SettleLease => "settle_lease",
            Self::CancelArrival => "cancel_arrival",
            Self::ConfirmArrival => "confirm_arrival",
            Self::LeadElsewhere => "lead_elsewhere",
            Self::ForwardPackets => "forward_packets",
            Self::LeaveNetwork => "leave_network",
            Self::ReceiveMachine => "receive_machine",
            Self::AwaitDecision => "await_decision",
            Self::RunMachine => "run_machine",
            Self::HoldMachine => "hold_machine",
            Self::GreetGuest => "greet_guest",
            Self::SetGuestClock => "set_guest_clock",
            Self::ShutDownGuest => "shut_down_guest",
            Self::EndVmm => "end_vmm",
            Self::KeepRemains => "keep_remains",
            Self::RemoveNetwork => "remove_network",
            Self::RemoveDirectory => "remove_directory",
            Self::ReleaseUid => "release_uid",
            Self::Forget => "forget",
        }
    }

    /// What takes it back, if anything does.
    pub const fn inverse(self) -> Option<Self> {
        match self {
            Self::MakeDirectory => Some(Self::RemoveDirectory),
            Self::MakeNetwork | Self::OpenNetwork => Some(Self::RemoveNetwork),
            Self::StartVmm | Self::BuildMachine | Self::RestoreMachine | Self::UnsealMachine => Some(Self::EndVmm),
            Self::StartSuccessor => Some(Self::EndOthers),
            Self::ArrangeArrival => Some(Self::CancelArrival),
            Self::SendMachine => Some(Self::RunMachine),
            Self::LeadElsewhere => Some(Self::OpenNetwork),
            Self::LeaveNetwork => Some(Self::MakeNetwork),
            Self::ReceiveMachine => Some(Self::EndVmm),
            Self::HoldTaps => Some(Self::ReleaseTaps),
            Self::SealMachine => Some(Self::DiscardSealed),
            Self::AcquireLeases => Some(Self::ReleaseLeases),
            Self::ConnectVolumes => Some(Self::DisconnectVolumes),
            Self::MountVolumes => Some(Self::UnmountVolumes),
            Self::QuiesceGuest => Some(Self::ThawGuest),
            Self::CopyMemory | Self::SaveMachine => Some(Self::DiscardSaved),
            Self::RunMachine => Some(Self::HoldMachine),
            Self::HoldMachine => Some(Self::RunMachine),
            Self::GreetGuest
            | Self::PlugVolumes
            | Self::UnmountVolumes
            | Self::DisconnectVolumes
            | Self::ReconnectVolumes
            | Self::ReleaseLeases
            | Self::ConvertLease
            | Self::ConvertOthers
            | Self::SettleLease
            | Self::ReleaseTaps
            | Self::CancelArrival
            | Self::ConfirmArrival
            | Self::ForwardPackets
            | Self::AwaitDecision
            | Self::MoveMachine
            | Self::TakeOver
            | Self::EndOthers
            | Self::PageOut
            | Self::KeepSealed
            | Self::DiscardSealed
            | Self::WarmUp
            | Self::ThawGuest
            | Self::DiscardSaved
            | Self::CommitBundle
            | Self::Register
            | Self::SetGuestClock
            | Self::ShutDownGuest
            | Self::EndVmm
            | Self::KeepRemains
            | Self::RemoveNetwork
            | Self::RemoveDirectory
            | Self::ReleaseUid
            | Self::Forget => None,
        }
    }

    /// Whether it has to do with volumes: left out of what is done for a VM that has no slots for any.
    pub const fn is_for_volumes(self) -> bool {
        matches!(
            self,
            Self::AcquireLeases
                | Self::ConnectVolumes
                | Self::PlugVolumes
                | Self::MountVolumes
                | Self::UnmountVolumes
                | Self::DisconnectVolumes
                | Self::ReconnectVolumes
                | Self::ReleaseLeases
                | Self::ConvertLease
                | Self::ConvertOthers
                | Self::SettleLease
        )
    }

    /// Whether it takes away what a VM held.
    pub const fn is_cleaning(self) -> bool {
        matches!(
            self,
            Self::EndVmm
                | Self::DisconnectVolumes
                | Self::ReleaseLeases
                | Self::EndOthers
                | Self::KeepRemains
                | Self::RemoveNetwork
                | Self::RemoveDirectory
                | Self::ReleaseUid
                | Self::Forget
        )
    }

    /// Whether the work goes on when this effect fails: the failure is noted in the operation's step.
    pub const fn is_best_effort(self) -> bool {
        matches!(
            self,
            Self::SetGuestClock
                | Self::DisconnectVolumes
                | Self::ReleaseLeases
                | Self::CancelArrival
                | Self::ForwardPackets
                | Self::ThawGuest
                | Self::DiscardSaved
                | Self::ReleaseTaps
                | Self::ShutDownGuest
                | Self::KeepRemains
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_effect_in_the_ledger_is_its_name() {
        let text = serde_json::to_string(&Effect::ShutDownGuest).unwrap();
        assert_eq!(text, format!("{:?}", Effect::ShutDownGuest.name()));
        assert_eq!(Effect::RunMachine.inverse().and_then(Effect::inverse), Some(Effect::RunMachine));
    }
}

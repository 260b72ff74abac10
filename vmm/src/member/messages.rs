//! What a keeper and its members say to each other, over one channel a member.

use serde::{Deserialize, Serialize};

use super::confine::Confinement;
use crate::arena_files::ArenaDescription;
use crate::board::BoardShape;
use crate::devices::backing::{BackingState, ExtentFileId};
use crate::devices::dma::{DmaCounters, DmaState};
use crate::devices::identity::{Identity, IdentityState};
use crate::devices::serial::SerialState;
#[cfg(debug_assertions)]
use crate::failure;
use crate::family::VmId;
use crate::frames::CutId;
use crate::kvm::{Irqchip, Times, VcpuState, VmState};
use crate::space::{Access, CutFigures, Keep, PageCounts, ResetFigures, SpaceReport};
use crate::words::{Gfn, MemoryShape};

/// What runs in a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum GuestKind {
    /// vCPUs under KVM.
    Kvm,
    /// A thread of the member that works on the window as the `puppet` case does: the same memory
    /// manager without KVM.
    Thread,
}

/// When lent pages are published.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Publication {
    /// Everything, in the background, from the cut on. Otherwise only what somebody asks for.
    pub in_background: bool,
    /// What the source does with its own copies.
    pub keep: Keep,
    /// The same from its second cut on. A source that keeps its own is published whole at each cut, for
    /// nobody knows what it has written since the last; one that shares has only what it has written.
    pub keep_later: Keep,
}

/// What the members of a colony are made for: the first message to their zygote, with the board and the
/// arena as descriptors.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Setup {
    /// Shape of the board.
    pub board: BoardShape,
    /// The arena.
    pub arena: ArenaDescription,
    /// The VM's memory.
    pub memory: MemoryShape,
    /// Whether huge pages are asked for.
    pub is_huge: bool,
    /// vCPUs.
    pub vcpus: u8,
    /// The interrupt controllers: all of them for images, which look for them.
    pub irqchip: Irqchip,
    /// What runs in the VM.
    pub guest: GuestKind,
    /// When lent pages are published.
    pub publication: Publication,
    /// What members may ask of the host.
    pub confinement: Confinement,
}

/// Asks a zygote for a member, whose end of its channel comes with it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Hatch {
    /// The member's slot on the board.
    pub slot: u32,
}

/// A VM at a cut, without its memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Snapshot {
    /// Each vCPU; none for a thread guest.
    pub vcpus: Vec<VcpuState>,
    /// The VM's clock and interrupt controllers; none for a thread guest.
    pub vm: Option<VmState>,
    /// The DMA engine.
    pub dma: DmaState,
    /// The DMA engine's backing; none if it is a pipe.
    pub backing: Option<BackingState>,
    /// The files that the backing is in: they come with it as descriptors, in this order, after the
    /// base file if there is one.
    pub extents: Vec<ExtentFileId>,
    /// The serial port.
    pub serial: SerialState,
    /// The identity device of the source.
    pub identity: IdentityState,
    /// The vCPU whose call asked for the cut: in the clones it returns 0. In the state of a vCPU that
    /// is so already; a thread guest is told.
    pub asked_by: Option<usize>,
}

/// A [`Snapshot`] on its way: the keeper has no need to look into it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EncodedSnapshot(#[serde(with = "serde_bytes")] Vec<u8>);

impl EncodedSnapshot {
    /// Encodes a snapshot.
    ///
    /// # Errors
    /// There is no memory for it.
    pub fn of(snapshot: &Snapshot) -> Result<Self, postcard::Error> {
        postcard::to_stdvec(snapshot).map(Self)
    }

    /// Decodes it.
    ///
    /// # Errors
    /// It is not one.
    pub fn decode(&self) -> Result<Snapshot, postcard::Error> {
        postcard::from_bytes(&self.0)
    }
}

/// A request to a member. Answered by [`Reply`] or an error text.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Order {
    /// Become the colony's first VM.
    Boot {
        /// Its name.
        vm: VmId,
        /// What it is told of itself.
        identity: Identity,
        /// The built-in guest's command line.
        command_line: String,
        /// Size of the DMA engine's backing, in bytes.
        backing_bytes: u64,
    },
    /// Become the colony's first VM, with a kernel that is not the built-in one. Comes with its file,
    /// then that of the initrd.
    BootImage {
        /// Its name.
        vm: VmId,
        /// What it is told of itself.
        identity: Identity,
        /// The kernel's command line.
        command_line: String,
        /// Whether there is an initrd.
        has_initrd: bool,
        /// Size of the DMA engine's backing, in bytes.
        backing_bytes: u64,
    },
    /// Input for the serial port. The answer is [`Reply::Accepted`].
    ConsoleInput(Vec<u8>),
    /// Become a clone and run.
    Become {
        /// Its name.
        vm: VmId,
        /// What it is told of itself.
        identity: Identity,
        /// Whether it runs only from [`Order::Resume`] on.
        is_paused: bool,
        /// The cut.
        cut: CutId,
        /// The state at the cut.
        snapshot: EncodedSnapshot,
    },
    /// Take a cut. Comes with the cut's block file and patch file.
    Cut {
        /// Its name.
        cut: CutId,
        /// This VM's cut before it.
        previous: Option<CutId>,
        /// The vCPU whose call asks for it: its clones see that call return 0.
        asked_by: Option<usize>,
    },
    /// Let go of what is pending in a cut that nobody needs.
    ReleaseCut {
        /// Which.
        cut: CutId,
    },
    /// Publish all that is pending now.
    Publish {
        /// What becomes of the VM's own copies.
        keep: Keep,
    },
    /// All that this VM shares is published: map what it has not touched yet, in the background.
    ResolveKnown,
    /// Stop vCPUs and hold completions until [`Order::Resume`].
    Quiesce,
    /// Go on.
    Resume,
    /// Stop the VM for a reset, if it can be reset.
    PrepareReset,
    /// Return to the cut that the VM is a clone of, and go on from there.
    Reset,
    /// The reset that a guest asked for cannot be.
    RefuseReset {
        /// Which vCPU asked.
        vcpu: usize,
    },
    /// Look whether the guest has halted for good; [`Event::Ended`] comes before the answer then.
    Look,
    /// Say what the VM's memory is.
    Harvest,
    /// Say what the VM and its process have done.
    Describe,
    /// Have a puppet do something. The result comes as [`Event::Puppet`].
    Puppet {
        /// Which vCPU.
        vcpu: usize,
        /// An [`order`](salp_protocol::order) and its operands.
        order: PuppetOrder,
    },
    /// Tell the guest to verify everything and to finish.
    Finish,
    /// The result of the guest's own call to fork.
    ForkResult {
        /// Which vCPU called.
        vcpu: usize,
        /// The clone, or none.
        clone: Option<VmId>,
    },
    /// Pin pages for a device outside.
    Pin {
        /// First page.
        first: Gfn,
        /// How many.
        pages: u64,
        /// The device.
        holder: PinHolder,
    },
    /// Take such a pin off again. The host's kernel may hold the pages longer: until the transfers
    /// that use them are over.
    Unpin {
        /// First page.
        first: Gfn,
        /// How many.
        pages: u64,
    },
    /// A device of the host's kernel begins a transfer to the start of a pinned page; the next
    /// [`Order::DeviceStore`] to that page ends it.
    DeviceBegin {
        /// The page.
        gfn: Gfn,
    },
    /// Hand a page to the host's kernel without a pin, as `vmsplice` does. Comes with the end of a
    /// pipe to write to.
    HandOver {
        /// The page.
        gfn: Gfn,
    },
    /// Store 8 bytes at the start of a pinned page, as a device would.
    DeviceStore {
        /// The page.
        gfn: Gfn,
        /// What.
        value: u64,
    },
    /// Read the 8 bytes at the start of a pinned page, as a device would.
    DeviceLoad {
        /// The page.
        gfn: Gfn,
    },
    /// Make pages zero.
    Discard {
        /// First page.
        first: Gfn,
        /// How many.
        pages: u64,
    },
    /// End the VM. The process stays as the image of what others still need.
    EndVm,
    /// End the process.
    Exit,
    /// Watch the [points](failure::point) of the process, or say what was reached. Also of a member that
    /// is no VM yet.
    #[cfg(debug_assertions)]
    Failures(failure::Watching),
    /// Make a system call that no VM needs.
    #[cfg(debug_assertions)]
    BreakOut,
}

impl Order {
    /// Whether the VM may not be what it was after this.
    #[must_use]
    pub const fn may_change_vm(&self) -> bool {
        #[cfg(debug_assertions)]
        if matches!(self, Self::Failures(_)) {
            return false;
        }
        !matches!(
            self,
            Self::Cut { .. }
                | Self::ReleaseCut { .. }
                | Self::Publish { .. }
                | Self::ResolveKnown
                | Self::Quiesce
                | Self::Look
                | Self::Harvest
                | Self::Describe
        )
    }
}

/// What device a pin by order is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PinHolder {
    /// One that works through the window, as the DMA engine does.
    Salp(Access),
    /// The host's kernel, by a buffer registered with io_uring: whatever the window maps later, it
    /// goes on with the same physical pages.
    Kernel,
}

/// One order of the puppet case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PuppetOrder {
    /// An [`order`](salp_protocol::order).
    pub order: u64,
    /// Operand in `rdi`.
    pub a: u64,
    /// Operand in `rsi`.
    pub b: u64,
    /// Operand in `rdx`.
    pub c: u64,
    /// Operand in `r8`.
    pub d: u64,
}

/// Moments of a cut, in nanoseconds of `CLOCK_MONOTONIC`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CutTimes {
    /// The member began to reserve.
    pub begun: u64,
    /// Reserved; the first kick came next.
    pub reserved: u64,
    /// All vCPUs were stopped.
    pub stopped: u64,
    /// Completions were held.
    pub held: u64,
    /// Devices were saved, and the vCPUs' threads were at their own states.
    pub saved: u64,
    /// Pinned pages were copied and memory was protected.
    pub protected: u64,
    /// The vCPUs' states were there.
    pub collected: u64,
    /// The resume was ordered.
    pub resumed: u64,
}

/// What a cut produced.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CutReply {
    /// For the clones.
    pub snapshot: EncodedSnapshot,
    /// How many files come with it: what the DMA engine's backing is in.
    pub extents: usize,
    /// Nothing of the VM can change before it is resumed: it was quiesced, with no transfer under way.
    pub is_still: bool,
    /// What was done in the pause.
    pub figures: CutFigures,
    /// When.
    pub times: CutTimes,
}

/// Moments of a reset, in nanoseconds of `CLOCK_MONOTONIC`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResetTimes {
    /// The member began; where the guest asked, that was just before.
    pub begun: u64,
    /// All vCPUs were stopped.
    pub stopped: u64,
    /// No transfer was under way any more.
    pub drained: u64,
    /// Memory was that of the cut.
    pub restored: u64,
    /// vCPUs and devices were those of the cut.
    pub set: u64,
    /// The resume was ordered.
    pub resumed: u64,
    /// The last vCPU entered the guest; 0 where that is not known yet.
    pub entered: u64,
}

/// What a reset did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResetReply {
    /// To the memory.
    pub figures: ResetFigures,
    /// When.
    pub times: ResetTimes,
}

/// What a member says of itself.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Description {
    /// Host address of the window.
    pub window: u64,
    /// What the DMA engine has done in this VM.
    pub dma_transfers: u64,
    /// Transfers that ended otherwise than OK.
    pub dma_failed: u64,
    /// Requests taken and not completed.
    pub dma_in_flight: u64,
    /// Leaves found out, at a first touch or because all was published.
    pub leaves_resolved: u64,
    /// Stores that trapped.
    pub store_faults: u64,
    /// Blocks written for clones.
    pub blocks_published: u64,
    /// Patch frames written for clones.
    pub patches_published: u64,
    /// Leaves whose protection went without a copy.
    pub leaves_reused: u64,
    /// Leaves whose own copy was dropped.
    pub leaves_dropped: u64,
    /// Minor faults of the process (`ru_minflt`).
    pub minor_faults: u64,
    /// Each vCPU's moments.
    pub vcpus: Vec<Times>,
    /// KVM's counters of vCPU 0, by name, while it is stopped.
    pub kvm: std::collections::BTreeMap<String, u64>,
}

impl Description {
    pub(super) fn count_dma(&mut self, counters: DmaCounters, in_flight: usize) {
        self.dma_transfers = counters.transfers;
        self.dma_failed = counters.failed;
        self.dma_in_flight = crate::words::wide(in_flight);
    }
}

/// The answer to an [`Order`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Reply {
    /// Done.
    Done,
    /// A cut was taken.
    Cut(Box<CutReply>),
    /// The VM has returned to its cut, and runs.
    Reset(ResetReply),
    /// What the memory is.
    Harvest(Box<SpaceReport>),
    /// What has been done.
    Describe(Box<Description>),
    /// What a device read.
    Loaded(u64),
    /// How many bytes of input found room: the rest is to be sent again.
    Accepted(usize),
    /// The clone's vCPUs enter the guest; at this moment the order to do so was given. One that is to begin
    /// paused could do so from this moment on.
    Running {
        /// In nanoseconds of `CLOCK_MONOTONIC`.
        at: u64,
        /// What mapping the window took, in nanoseconds; 0 at a boot.
        window_ns: u64,
    },
    /// Which points were reached; nothing where the watch begins.
    #[cfg(debug_assertions)]
    Failures(failure::Reached),
}

/// What a guest says of its case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Rounds done.
    pub rounds: u64,
    /// Errors found.
    pub errors: u64,
    /// Transfers verified.
    pub transfers: u64,
    /// A figure of the case.
    pub figure: u64,
    /// The case has verified everything and ended.
    pub is_finished: bool,
}

/// The ways in which a guest's run ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum HowEnded {
    /// It wrote its status to the exit port.
    Exited,
    /// It has reset its machine.
    Reset,
    /// It has halted, and nothing can wake it.
    Halted,
    /// It did what its machine cannot go on from: a triple fault, an instruction that KVM does not know.
    Crashed,
    /// Its process is gone; this its keeper says.
    Killed,
}

/// What a member says unasked.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Event {
    /// The guest reports.
    Progress(Progress),
    /// A puppet has done its order, on that vCPU.
    Puppet {
        /// Which vCPU.
        vcpu: usize,
        /// The order's result.
        result: u64,
    },
    /// The guest knows who it is in this generation.
    IsReady {
        /// Which.
        generation: u64,
    },
    /// The guest wants to be forked.
    ForkAsked {
        /// By which vCPU.
        vcpu: usize,
    },
    /// The guest wants to be reset, and that is not for its member alone to do.
    ResetAsked {
        /// By which vCPU.
        vcpu: usize,
    },
    /// The VM is what it was when it began: whatever was told of its guest before is past.
    Restarting,
    /// The VM has been reset and its vCPUs are in the guest.
    WasReset(ResetReply),
    /// The clone's first exit.
    FirstExit {
        /// In nanoseconds of `CLOCK_MONOTONIC`.
        at: u64,
    },
    /// The source's vCPUs have entered the guest again after a cut: the end of the pause.
    Reentered {
        /// The cut.
        cut: CutId,
        /// The last of them, in nanoseconds of `CLOCK_MONOTONIC`.
        at: u64,
        /// What the VM's memory was right after that.
        pages: PageCounts,
    },
    /// Nothing is pending any more in these cuts.
    CutsFinished(Vec<CutId>),
    /// Buffers were registered or unregistered, for the first time since the keeper looked at their counts
    /// on the board.
    BuffersChanged,
    /// The guest has done nothing for a while and sleeps: it may have halted.
    Quiet,
    /// The guest's run has ended.
    Ended {
        /// In which way.
        how: HowEnded,
        /// Its exit status, if it gave one.
        status: Option<u32>,
        /// What happened.
        text: String,
    },
    /// Something has gone wrong that does not end the VM by itself.
    Trouble(String),
    /// Console output.
    Console(Vec<u8>),
    /// Console input was refused, and there is room again.
    ConsoleRoom,
}

/// A request with its number.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Request {
    /// Comes back with the answer.
    pub number: u64,
    /// What is asked.
    pub order: Order,
}

/// From a member to the keeper.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Message {
    /// The process exists, and has this number.
    Born(i32),
    /// The member is ready to become a VM.
    Ready,
    /// There is no process, or it could not be made ready.
    Unfit(String),
    /// The answer to a request.
    Answer {
        /// The request's number.
        number: u64,
        /// The answer.
        result: Result<Reply, String>,
    },
    /// Unasked.
    Event(Event),
}

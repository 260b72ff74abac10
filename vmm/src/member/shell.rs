//! A member before it is a VM: whatever can be made ahead has been made, and belongs to this
//! process alone: window, KVM VM, slots over the window, vCPUs, the threads that a clone needs at once.
#![expect(unsafe_code, reason = "vouches to KVM for the window")]

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::MemberError;
use super::machine::MemberMachine;
use super::messages::{Event, Setup};
use super::services::Services;
use super::zygote::Heritage;
use crate::arena_files::{ArenaDir, ArenaReader, ArenaWriter};
use crate::board::{Board, WordMemory};
use crate::ipc::{Channel, SharedMemory};
use crate::kvm::{Kvm, Region, VcpuThread, Vm, VmConfig, VouchedAddress};
use crate::space::{Space, SpaceError};
use crate::sync::AtomicU32;
use crate::window::{OnEnd, OnFailure, Resolvers, Window};
use crate::words::{LEAF_BYTES, wide};

/// Words of a board in memory that processes share.
pub struct SharedWords {
    memory: SharedMemory,
    count: usize,
}

impl SharedWords {
    /// All of `memory` as words.
    #[must_use]
    pub fn over(memory: SharedMemory) -> Self {
        let count = memory.len_bytes() / size_of::<u32>();
        Self { memory, count }
    }

    /// The memory.
    #[must_use]
    pub fn memory(&self) -> &SharedMemory {
        &self.memory
    }

    fn bytes(words: &Range<usize>) -> Range<usize> {
        words.start * size_of::<u32>()..words.end * size_of::<u32>()
    }
}

impl WordMemory for SharedWords {
    fn words(&self) -> &[AtomicU32] {
        self.memory.words_u32(0, self.count).expect("the count was computed from the length")
    }

    fn reserve(&self, words: Range<usize>) -> io::Result<()> {
        self.memory.reserve(Self::bytes(&words)).map_err(io::Error::other)
    }

    fn punch(&self, words: Range<usize>) -> io::Result<()> {
        self.memory.punch(Self::bytes(&words)).map_err(io::Error::other)
    }

    fn clear(&self, words: Range<usize>) -> io::Result<()> {
        self.memory.clear(Self::bytes(&words)).map_err(io::Error::other)
    }
}

/// See the module.
pub struct Shell {
    /// What it was made for.
    pub setup: Setup,
    /// The colony's board.
    pub board: Board,
    /// Creates the files of this member.
    pub files: Arc<MemberFiles>,
    /// The VM's memory: anonymous, untouched.
    pub memory: ServedSpace,
    /// The KVM VM; none for a thread guest.
    pub vm: Option<Arc<Vm>>,
    /// Its vCPUs, parked.
    pub vcpus: Vec<VcpuThread>,
    /// What the vCPUs' exits go to.
    pub machine: Arc<MemberMachine>,
}

/// A space with the threads that serve it.
pub struct ServedSpace {
    /// The space.
    pub space: Arc<Space<Window>>,
    /// They work for clones of the VM.
    pub services: Services,
    // Last: joined after everything that may fault.
    /// They resolve its faults.
    pub resolvers: Resolvers,
}

/// A member's side of the arena.
pub struct MemberFiles {
    /// Opens any file.
    pub reader: Arc<ArenaReader>,
    /// Creates files.
    pub writer: ArenaWriter,
    /// Whose files these are: their names begin with it.
    pub slot: u32,
}

impl Shell {
    /// Makes a shell.
    ///
    /// # Errors
    /// Whatever the host does not have or refuses.
    pub fn new(heritage: Heritage, slot: u32, keeper: Arc<Channel>) -> Result<Self, MemberError> {
        let Heritage { setup, mut descriptors, kvm } = heritage;
        if descriptors.is_empty() {
            return Err(MemberError::Protocol("a setup comes with the board"));
        }
        let board = SharedWords::over(SharedMemory::from_fd(descriptors.remove(0))?);
        let board = Board::new(setup.board, Arc::new(board));
        let (reader, writer) = ArenaDir::from_parts(&setup.arena, descriptors)?;
        let reader = Arc::new(reader);
        let files = MemberFiles { reader: Arc::clone(&reader), writer, slot };
        let window = Window::new(setup.memory, setup.is_huge, reader).map_err(MemberError::Window)?;
        let machine = Arc::new(MemberMachine::new(setup.vcpus, keeper).map_err(MemberError::Window)?);
        let (vm, vcpus) = match kvm {
            Some(kvm) => {
                let (vm, vcpus) = make_vm(&kvm, &setup, &window, &machine)?;
                (Some(vm), vcpus)
            }
            None => (None, Vec::new()),
        };
        let space = Space::unused(window, board.clone(), slot, setup.memory);
        let (space, files) = (Arc::new(space), Arc::new(files));
        // One more than can wait for another process at one time, and one for the devices.
        let threads = usize::from(setup.vcpus) + 2;
        let resolvers = Resolvers::start(&space, threads, &on_failure(&machine), &on_end(&machine))
            .map_err(MemberError::Window)?;
        let keep = setup.publication.keep;
        let services = Services::new(&space, &machine, resolvers.surplus(), board.clone(), slot, keep);
        let memory = ServedSpace { space, services, resolvers };
        Ok(Self { setup, board, files, memory, vm, vcpus, machine })
    }
}

/// What becomes of faults that cannot be resolved: the keeper is told.
fn on_failure(machine: &Arc<MemberMachine>) -> OnFailure {
    let machine = Arc::clone(machine);
    Arc::new(move |error: SpaceError| {
        // After the end of a VM its faults stay open, and concern nobody.
        if !matches!(error, SpaceError::Stopping) {
            machine.tell(Event::Trouble(error.to_string()));
        }
    })
}

/// What follows from the end of a thread: the member's loop joins it.
fn on_end(machine: &Arc<MemberMachine>) -> OnEnd {
    let machine = Arc::clone(machine);
    Arc::new(move || machine.watch().thread_ends())
}

fn make_vm(
    kvm: &Kvm,
    setup: &Setup,
    window: &Window,
    machine: &Arc<MemberMachine>,
) -> Result<(Arc<Vm>, Vec<VcpuThread>), MemberError> {
    let region = |(first, count): (crate::words::LeafNumber, u32)| Region {
        gpa: first.gpa(),
        len_bytes: count as usize * LEAF_BYTES,
        // SAFETY: the range is the window's as long as the process runs a VM over it (the VM is closed
        // first), and Rust keeps nothing in it.
        host: unsafe { VouchedAddress::new(window.host_address(first.gpa()).as_ptr()) },
    };
    let regions: Vec<Region> = setup.memory.regions().into_iter().map(region).collect();
    debug_assert!(
        regions.iter().map(|region| wide(region.len_bytes)).sum::<u64>() == setup.memory.ram_bytes()
    );
    let config = VmConfig { vcpus: setup.vcpus, irqchip: setup.irqchip, regions };
    let (vm, vcpus) = Vm::new(kvm, &config)?;
    let threads = vcpus
        .into_iter()
        .map(|vcpu| {
            vcpu.remember()?;
            let machine = Arc::clone(machine);
            VcpuThread::spawn(vcpu, machine)
        })
        .collect::<Result<Vec<_>, _>>()?;
    Ok((Arc::new(vm), threads))
}

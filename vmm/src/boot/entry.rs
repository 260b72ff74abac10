//! How a vCPU enters the built-in guest: segments, descriptor tables, task state, registers.
//!
//! Each vCPU starts in 64-bit ring 3. An interrupt or exception enters ring 0 through the IDT on the
//! vCPU's own ring-0 stack; all ports are open to ring 3 by the bitmap of the vCPU's task state
//! (hosts without hardware virtualization know no IOPL, see SDM vol. 1, 19.5.2 for the bitmap).

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use salp_protocol::layout;
use serde::{Deserialize, Serialize};

use super::paging::TABLES;
use super::segment;

pub(super) const GDT: u64 = 0x1000;
pub(super) const IDT: u64 = 0x2000;
const TASKS: u64 = 0x8000;
const TASK_STRIDE: u64 = 0x3000;
const STACKS: u64 = 0x2_0000;
const STACK_BYTES: u64 = 0x2000;

/// Bytes of the task state without its bitmap.
const TASK_BYTES: usize = 0x68;
/// One bit for each of 65,536 ports, and the byte of ones that ends the bitmap.
const BITMAP_BYTES: usize = 8192 + 1;

const _: () = {
    assert!(TASK_BYTES + BITMAP_BYTES <= TASK_STRIDE as usize);
    assert!(TASKS + layout::MAX_VCPUS * TASK_STRIDE <= STACKS);
    assert!(STACKS + layout::MAX_VCPUS * STACK_BYTES <= TABLES);
    assert!(IDT + 256 * 16 <= layout::COMMAND_LINE);
    assert!(layout::COMMAND_LINE + layout::COMMAND_LINE_BYTES as u64 <= TASKS);
};

/// Selectors: ring-0 code, ring-3 data and code, the first vCPU's task.
const KERNEL_CODE: u16 = 0x08;
const USER_DATA: u16 = 0x2b;
const USER_CODE: u16 = 0x33;
const FIRST_TASK: u16 = 0x40;

const CR0: u64 = 0x8005_0033; // PG, AM, WP, NE, ET, MP, PE
const CR4: u64 = 0x620; // PAE, OSFXSR, OSXMMEXCPT
const EFER: u64 = 0x500; // LME, LMA
const RFLAGS: u64 = 0x202; // IF

/// Where the loaded guest's vCPUs begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntryState {
    /// The image's entry point.
    pub entry: u64,
    /// How many vCPUs the tables were made for.
    pub vcpus: u8,
    /// Bytes of RAM, without the device hole.
    pub ram_bytes: u64,
}

impl EntryState {
    /// The general registers of vCPU `vcpu`, which is below [`EntryState::vcpus`].
    #[must_use]
    pub fn registers(&self, vcpu: u8) -> kvm_regs {
        kvm_regs {
            rip: self.entry,
            rsp: layout::FREE - u64::from(vcpu) * layout::STACK_BYTES,
            rflags: RFLAGS,
            rdi: u64::from(vcpu),
            rsi: u64::from(self.vcpus),
            rdx: self.ram_bytes,
            ..Default::default()
        }
    }

    /// The special registers of vCPU `vcpu`; what does not matter here (the local APIC's base, for
    /// one, which must stay in xAPIC mode) is taken from `base`, the vCPU's state as KVM created
    /// it. To be set after `KVM_SET_CPUID2`. A vCPU other than 0 must also be made runnable by
    /// `KVM_SET_MP_STATE`.
    #[must_use]
    pub fn special_registers(&self, vcpu: u8, base: kvm_sregs) -> kvm_sregs {
        let data = kvm_segment { dpl: 3, ..segment::flat_data(USER_DATA) };
        let code = segment::long_code_beside(data, USER_CODE);
        let selector = FIRST_TASK + u16::from(vcpu) * 16;
        let task = segment::task(selector, task_address(vcpu), task_limit());
        kvm_sregs {
            gdt: kvm_dtable { base: GDT, limit: gdt_limit(), ..Default::default() },
            idt: kvm_dtable { base: IDT, limit: 256 * 16 - 1, ..Default::default() },
            cr0: CR0,
            cr2: 0,
            cr3: TABLES,
            cr4: CR4,
            efer: EFER,
            ..segment::with_segments(base, code, data, task)
        }
    }
}

/// The global descriptor table, for all vCPUs.
pub(super) fn gdt() -> Vec<u8> {
    let mut entries = vec![0_u64; usize::from(gdt_limit() + 1) / 8];
    entries[usize::from(KERNEL_CODE) / 8] = 0x00af_9b00_0000_ffff;
    entries[usize::from(USER_DATA) / 8] = 0x00cf_f300_0000_ffff;
    entries[usize::from(USER_CODE) / 8] = 0x00af_fb00_0000_ffff;
    let tasks = entries[usize::from(FIRST_TASK) / 8..].chunks_exact_mut(2);
    for (vcpu, descriptor) in (0..).zip(tasks) {
        let (base, limit) = (task_address(vcpu), u64::from(task_limit()));
        // Present, busy 64-bit task state (SDM vol. 3, figure 9-4). It lies below 16 MiB.
        descriptor[0] = limit & 0xffff | (base & 0xff_ffff) << 16 | 0x8b << 40;
    }
    entries.into_iter().flat_map(u64::to_le_bytes).collect()
}

/// The interrupt descriptor table: an interrupt gate for each vector, to the image's entry stubs.
pub(super) fn idt() -> Vec<u8> {
    (0..256)
        .flat_map(|vector| {
            let stub = layout::VECTORS + vector * layout::VECTOR_BYTES;
            let gate = stub & 0xffff
                | u64::from(KERNEL_CODE) << 16
                | 0x8e << 40 // present, ring 0, interrupt gate
                | (stub >> 16 & 0xffff) << 48;
            [gate, stub >> 32]
        })
        .flat_map(u64::to_le_bytes)
        .collect()
}

/// The task state of vCPU `vcpu`: its ring-0 stack, and every port open.
pub(super) fn task(vcpu: u8) -> Vec<u8> {
    let mut task = vec![0; TASK_BYTES + BITMAP_BYTES];
    let stack = STACKS + (u64::from(vcpu) + 1) * STACK_BYTES;
    task[4..12].copy_from_slice(&stack.to_le_bytes());
    task[0x66..0x68].copy_from_slice(&bitmap_offset().to_le_bytes());
    task[TASK_BYTES + BITMAP_BYTES - 1] = 0xff;
    task
}

/// Where the task state of vCPU `vcpu` lies.
pub(super) fn task_address(vcpu: u8) -> u64 {
    TASKS + u64::from(vcpu) * TASK_STRIDE
}

const fn bitmap_offset() -> u16 {
    TASK_BYTES as u16
}

const fn task_limit() -> u32 {
    (TASK_BYTES + BITMAP_BYTES - 1) as u32
}

const fn gdt_limit() -> u16 {
    FIRST_TASK + 16 * layout::MAX_VCPUS as u16 - 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::words::wide;

    const STATE: EntryState = EntryState { entry: 0x10_1000, vcpus: 2, ram_bytes: 8 << 20 };

    #[test]
    fn tables_hold_what_the_registers_say() {
        let gdt = gdt();
        let special = STATE.special_registers(1, kvm_sregs::default());
        assert_eq!(gdt.len(), usize::from(special.gdt.limit) + 1);
        assert_eq!(idt().len(), usize::from(special.idt.limit) + 1);
        let at = usize::from(special.tr.selector);
        let base = u64::from(gdt[at + 2]) | u64::from(gdt[at + 3]) << 8 | u64::from(gdt[at + 4]) << 16;
        assert_eq!(base, special.tr.base);
        assert_eq!(gdt[at + 5], 0x8b);
        assert_eq!(u32::from(gdt[at]) | u32::from(gdt[at + 1]) << 8, special.tr.limit);
    }

    #[test]
    fn every_port_is_open_to_ring_3() {
        let task = task(0);
        let bitmap = usize::from(u16::from_le_bytes([task[0x66], task[0x67]]));
        assert!(task[bitmap..bitmap + 8192].iter().all(|&byte| byte == 0));
        assert_eq!(task[bitmap + 8192], 0xff);
    }

    #[test]
    fn gates_lead_to_the_stubs_in_ring_0() {
        let idt = idt();
        for vector in 0..256 {
            let gate = &idt[vector * 16..vector * 16 + 16];
            let stub = u64::from(gate[0])
                | u64::from(gate[1]) << 8
                | u64::from(gate[6]) << 16
                | u64::from(gate[7]) << 24;
            assert_eq!(stub, layout::VECTORS + wide(vector) * layout::VECTOR_BYTES);
            assert_eq!((gate[2], gate[5]), (8, 0x8e));
        }
    }

    #[test]
    fn vcpus_have_their_own_stacks_and_tasks() {
        assert_eq!(STATE.registers(0).rsp - STATE.registers(1).rsp, layout::STACK_BYTES);
        assert!(STATE.registers(7).rsp - layout::STACK_BYTES >= layout::STACKS);
        assert_ne!(task(0), task(1));
        assert_ne!(task_address(0), task_address(1));
    }

    #[test]
    fn the_state_survives_serialisation() {
        let text = serde_json::to_string(&STATE).expect("plain numbers serialise");
        assert_eq!(serde_json::from_str::<EntryState>(&text).expect("as written"), STATE);
    }
}

//! Tear-down of a VM, in the background: the kernel takes milliseconds to close one.
//!
//! # Order
//! Ask the vCPUs to stop and wait for them; release what vCPUs that still wait are waiting for (the
//! caller's `release`: a window's userfaultfd is unregistered here, which wakes everyone blocked in
//! it); end the threads and close the vCPUs; close the VM. Closing a VM while a vCPU is blocked in
//! a fault, or releasing before the vCPUs have been told to stop, goes wrong: the first hangs, the
//! second lets a guest run on over pages that are not what it left there.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::error::KvmError;
use super::vcpu::VcpuThread;
use super::vm::Vm;

/// How long vCPUs may take to stop before what they wait for is released.
const PATIENCE: Duration = Duration::from_secs(1);

/// How a VM was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closed {
    /// The VM is gone.
    Gone,
    /// Somebody else still holds the VM's `Arc`; it goes with the last of them.
    StillHeld,
}

/// A VM on its way out.
#[derive(Debug)]
pub struct Closing(JoinHandle<Closed>);

impl Closing {
    /// Waits for the end. Not needed: a dropped `Closing` goes on in the background.
    #[must_use]
    pub fn wait(self) -> Closed {
        match self.0.join() {
            Ok(closed) => closed,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

/// Closes a VM on a helper thread. `release` is called after the vCPUs have stopped, or after a
/// second if some have not.
///
/// # Errors
/// No thread could be started; then all was dropped on the calling thread, `release` not called.
pub fn close(
    vcpus: Vec<VcpuThread>,
    vm: Arc<Vm>,
    release: impl FnOnce() + Send + 'static,
) -> Result<Closing, KvmError> {
    let refused = |source| KvmError::Ioctl { name: "starting a closing thread", source };
    crate::failure::point("close.thread").map_err(|injected| refused(injected.into()))?;
    std::thread::Builder::new()
        .name("vm-close".to_owned())
        .spawn(move || {
            vcpus.iter().for_each(VcpuThread::request_stop);
            let deadline = Instant::now() + PATIENCE;
            for vcpu in &vcpus {
                let left = deadline.saturating_duration_since(Instant::now());
                if let Err(error) = vcpu.wait_stopped(left) {
                    tracing::debug!(%error, "a vcpu stops only after the release");
                }
            }
            release();
            drop(vcpus);
            match Arc::into_inner(vm) {
                Some(vm) => {
                    drop(vm);
                    Closed::Gone
                }
                None => Closed::StillHeld,
            }
        })
        .map(Closing)
        .map_err(refused)
}

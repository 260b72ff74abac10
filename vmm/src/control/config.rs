//! What a VM is to be, as a document: `salp run --config`, and `POST /v1/vms` for another VM of a colony.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::{PartialSchema as _, ToSchema};

use super::ControlError;
use super::service::Settings;
use crate::keeper::limits::Limits;

/// What a VM is to be. What is not said is as usual; in a colony, as for its first VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct VmConfig {
    /// The VM's name: 1 to 63 letters, digits, `-`, `_` or `.`, a letter or digit first. Without one it is
    /// made up.
    #[schema(example = "web", pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    pub name: Option<String>,
    /// Memory in bytes, a multiple of 2 MiB. All VMs of a colony have the same.
    #[schema(example = 536870912, minimum = 2097152)]
    pub memory_bytes: Option<u64>,
    /// vCPUs. All VMs of a colony have as many.
    #[schema(minimum = 1, maximum = 8)]
    pub cpus: Option<u8>,
    /// A kernel to run instead of the built-in guest: the path of a static ELF64 image or a bzImage.
    #[schema(value_type = Option<String>, example = "/boot/vmlinux")]
    pub kernel: Option<PathBuf>,
    /// The path of the kernel's initial RAM disk.
    #[schema(value_type = Option<String>)]
    pub initrd: Option<PathBuf>,
    /// What the guest is told.
    #[schema(example = "case=idle")]
    pub cmdline: Option<String>,
    /// Its devices.
    #[schema(inline)]
    pub devices: DevicesConfig,
    /// What its colony may have. They are the colony's, not another VM's.
    #[schema(inline)]
    pub limits: LimitsConfig,
}

/// A VM's devices.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DevicesConfig {
    /// The path of a file that the DMA engine's storage begins with; it is never written. All VMs of a
    /// colony have the same.
    #[schema(value_type = Option<String>)]
    pub dma_backing: Option<PathBuf>,
}

/// What a colony may have.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsConfig {
    /// VMs at one time.
    #[schema(minimum = 1)]
    pub vms: Option<usize>,
    /// vCPUs of all VMs together.
    #[schema(minimum = 1)]
    pub cpus: Option<usize>,
    /// Memory that its VMs may share, in bytes.
    pub memory_bytes: Option<u64>,
}

impl LimitsConfig {
    /// As the keeper takes them.
    #[must_use]
    pub fn limits(&self) -> Limits {
        Limits { vms: self.vms, cpus: self.cpus, memory_bytes: self.memory_bytes }
    }
}

impl VmConfig {
    /// Reads a file.
    ///
    /// # Errors
    /// It cannot be read, or is no such document.
    pub fn read(path: &Path) -> Result<Self, ControlError> {
        let text = std::fs::read(path);
        let text = text.map_err(|source| ControlError::Host { action: "read", path: path.into(), source })?;
        serde_json::from_slice(&text)
            .map_err(|error| ControlError::Config { path: path.into(), reason: error.to_string() })
    }

    /// The JSON Schema of such a document.
    #[must_use]
    pub fn json_schema() -> Value {
        let mut schema = json!({
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "What a salp VM is to be",
        });
        let fields = serde_json::to_value(Self::schema()).unwrap_or_default();
        if let (Some(schema), Value::Object(fields)) = (schema.as_object_mut(), fields) {
            schema.extend(fields);
        }
        schema
    }

    /// The settings of another VM of a colony whose first has these.
    ///
    /// # Errors
    /// The colony's VMs are not like that.
    pub(super) fn beside(&self, first: &Settings) -> Result<Settings, ControlError> {
        let unlike = |what: &'static str, theirs: String| {
            Err(ControlError::UnlikeColony { what, reason: format!("its VMs have {theirs}") })
        };
        if self.memory_bytes.is_some_and(|bytes| bytes != first.memory_bytes) {
            return unlike("memory_bytes", format!("{} bytes", first.memory_bytes));
        }
        if self.cpus.is_some_and(|cpus| cpus != first.cpus) {
            return unlike("cpus", format!("{} vCPUs", first.cpus));
        }
        if self.devices.dma_backing.is_some() && self.devices.dma_backing != first.dma_backing {
            return unlike("devices.dma_backing", "another one, or none".to_owned());
        }
        if self.limits != LimitsConfig::default() && self.limits.limits() != first.limits {
            return unlike("limits", "other limits".to_owned());
        }
        if (self.kernel.is_some() || self.initrd.is_some()) && first.kernel.is_none() {
            return unlike("kernel", "the interrupt controllers of the built-in guest".to_owned());
        }
        Ok(Settings {
            name: self.name.clone(),
            command_line: self.cmdline.clone().unwrap_or_else(|| first.command_line.clone()),
            kernel: self.kernel.clone().or_else(|| first.kernel.clone()),
            // Another kernel has nothing to do with the first one's.
            initrd: match &self.kernel {
                None => self.initrd.clone().or_else(|| first.initrd.clone()),
                Some(_) => self.initrd.clone(),
            },
            ..first.clone()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first() -> Settings {
        Settings {
            name: Some("a".to_owned()),
            memory_bytes: 32 << 20,
            cpus: 1,
            command_line: "case=idle".to_owned(),
            kernel: None,
            initrd: None,
            limits: Limits::default(),
            dma_backing: None,
            seccomp: crate::member::confine::Confinement::On,
            is_background: true,
            place: None,
            program: None,
        }
    }

    #[test]
    fn the_schema_names_every_field_and_needs_no_other_document() {
        let schema = VmConfig::json_schema();
        assert!(!schema.to_string().contains("#/components"), "{schema}");
        let fields = serde_json::to_value(VmConfig::default()).expect("json");
        for (name, value) in fields.as_object().expect("an object") {
            let described = &schema["properties"][name];
            let inner = &described["allOf"][0]["properties"];
            assert!(described["description"].is_string() || inner.is_object(), "{name}: {described}");
            for name in value.as_object().into_iter().flatten().map(|(name, _)| name) {
                assert!(inner[name]["description"].is_string(), "{name}: {inner}");
            }
        }
        assert_eq!(schema["additionalProperties"], false);
    }

    #[test]
    fn another_vm_of_a_colony_is_like_the_first() {
        let config: VmConfig = serde_json::from_str(r#"{"memory_bytes": 33554432}"#).expect("it is one");
        let settings = config.beside(&first()).expect("the same memory");
        assert_eq!((settings.name, settings.command_line.as_str()), (None, "case=idle"));
        for unlike in [
            r#"{"memory_bytes": 67108864}"#,
            r#"{"cpus": 2}"#,
            r#"{"kernel": "/k"}"#,
            r#"{"limits": {"vms": 3}}"#,
            r#"{"devices": {"dma_backing": "/b"}}"#,
        ] {
            let config: VmConfig = serde_json::from_str(unlike).expect("it is one");
            let refused = config.beside(&first());
            assert!(matches!(refused, Err(ControlError::UnlikeColony { .. })), "{unlike}");
        }
        assert!(serde_json::from_str::<VmConfig>(r#"{"memory": 1}"#).is_err());
    }
}

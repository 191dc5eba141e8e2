variable "region" {
  type        = string
  description = "Where everything is, the faces included."
}

variable "name" {
  type        = string
  default     = "omnifer"
  description = "First part of all names; the cluster's name in cluster.yaml."
}

variable "sources_bucket" {
  type        = string
  description = "Name of the bucket of labeled sets and pools; nodes can only read it."
}

variable "runs_bucket" {
  type        = string
  description = "Name of the bucket of runs and of MLflow's artifacts."
}

variable "ami" {
  type        = string
  description = "Ubuntu 24.04 with NVIDIA's driver, such as AWS's Deep Learning Base image; for all nodes."
}

variable "mlflow_image" {
  type        = string
  description = "infra/docker/Dockerfile.mlflow, built and pushed to a registry of yours."
}

variable "cidr" {
  type        = string
  default     = "10.20.0.0/16"
  description = "Addresses of the network; nobody else's."
}

variable "zones" {
  type        = list(string)
  default     = ["a", "b"]
  description = "Letters of the two zones that hold nodes and database."
  validation {
    condition     = length(var.zones) == 2
    error_message = "Two zones are needed: the database asks for them."
  }
}

variable "old_days" {
  type        = number
  default     = 30
  description = "Days that replaced and deleted objects can still be brought back."
}

variable "disposable" {
  type        = bool
  default     = false
  description = "Lets destroy delete full buckets and the database without a snapshot: for tests."
}

variable "endpoint" {
  type        = string
  default     = ""
  description = "Another AWS API than Amazon's, such as a local one in tests."
}
